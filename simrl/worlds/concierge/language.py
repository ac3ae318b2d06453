"""Words of the concierge world: intents, spellings and typos, and parsing of either side's messages.

All texts are lower-case ASCII words with a few of `, ?`. Parsing reads words only; other characters separate them.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

ANY = 'any'  # value of an attribute that does not matter


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute of a place that a person may care about.

    Attributes:
        name: its word in intents and questions.
        values: possible values, equally likely in an intent.
        synonyms: another word for each value.
        cared: probability that a person cares about it.
        lead: optional word before a value; '' if there is none.
    """

    name: str
    values: tuple[str, ...]
    synonyms: tuple[str, ...]
    cared: float
    lead: str


ATTRIBUTES = (
    Attribute(
        'food',
        ('thai', 'italian', 'indian', 'mexican', 'japanese', 'french'),
        ('satay', 'pasta', 'curry', 'tacos', 'sushi', 'bistro'),
        cared=0.9,
        lead='',
    ),
    Attribute('price', ('cheap', 'moderate', 'fancy'), ('budget', 'midrange', 'upscale'), cared=0.7, lead=''),
    Attribute(
        'area',
        ('downtown', 'harbor', 'station', 'park'),
        ('center', 'waterfront', 'railway', 'gardens'),
        cared=0.7,
        lead='near',
    ),
    Attribute(
        'time',
        ('breakfast', 'lunch', 'dinner', 'drinks'),
        ('brunch', 'midday', 'supper', 'cocktails'),
        cared=0.7,
        lead='for',
    ),
)
NAMES = tuple(attribute.name for attribute in ATTRIBUTES)

# Texts of people.
GREETINGS = ('hi', 'hello', 'hey')
LEAD_INS = ('i want', 'i need', 'looking for')
VAGUE_OPENINGS = ('i want to eat out', 'we need a table', 'looking for a place')
REMARKS = ('we are hungry', 'it is my birthday', 'my friend is visiting', 'so busy today', 'what a rainy day')
CORRECTIONS = ('no', 'um')
ACCEPTANCES = ('ok thanks', 'great thanks', 'perfect thanks')
LEAVE = 'forget it'

# Texts of the scripted assistant.
PROPOSALS = ('try', 'how about')
QUESTIONS = ('which', 'what')
OPEN_QUESTION = 'what would you like?'
CHATTER = ('sure, happy to help', 'let me think', 'one moment please', 'good to see you')

_WORD = re.compile('[a-z]+')


def words(text: str) -> list[str]:
    """Splits any text into words, in lower case."""
    return _WORD.findall(text.lower())


VALUE_OF: Mapping[str, tuple[int, str]] = {
    word: (number, value)
    for number, attribute in enumerate(ATTRIBUTES)
    for value, synonym in zip(attribute.values, attribute.synonyms, strict=True)
    for word in (value, synonym)
}  # clean spelling of a value -> number of its attribute, and the value
SYNONYM_OF: Mapping[str, str] = {
    value: synonym
    for attribute in ATTRIBUTES
    for value, synonym in zip(attribute.values, attribute.synonyms, strict=True)
}


def clean_words() -> set[str]:
    """Collects all correctly spelled words."""
    users = (*GREETINGS, *LEAD_INS, *VAGUE_OPENINGS, *REMARKS, *CORRECTIONS, *ACCEPTANCES, LEAVE, 'please', 'not')
    assistants = (*PROPOSALS, *QUESTIONS, OPEN_QUESTION, *CHATTER)
    leads = (attribute.lead for attribute in ATTRIBUTES)
    phrases = (*users, *assistants, *leads, 'and', ANY, *NAMES, *VALUE_OF)
    return {word for phrase in phrases for word in words(phrase)}


def _swap(word: str, at: int) -> str:
    return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


def _drop(word: str, at: int) -> str:
    return word[:at] + word[at + 1 :]


def _double(word: str, at: int) -> str:
    return word[: at + 1] + word[at:]


def _draw_typos() -> dict[str, tuple[str, ...]]:
    """Draws three typos of each value's word: a swapped, dropped or doubled letter after the first, in random order."""
    rng = random.Random('typos')
    taken = clean_words()
    typos = {}
    for word in VALUE_OF:
        found: list[str] = []
        for change in rng.sample((_swap, _drop, _double), 3):
            positions = range(1, len(word) - (change is _swap))
            typo = next(t for at in rng.sample(positions, len(positions)) if (t := change(word, at)) not in taken)
            taken.add(typo)
            found.append(typo)
        typos[word] = tuple(found)
    return typos


TYPOS: Mapping[str, tuple[str, ...]] = _draw_typos()
TYPO_WEIGHTS = (0.5, 0.3, 0.2)
_TYPO_OF = {typo: word for word, typos in TYPOS.items() for typo in typos}


@dataclasses.dataclass(frozen=True)
class Intent:
    """A person's goal: a value per attribute, 'any' if the attribute does not matter.

    Text form: 'food thai price cheap area any time dinner'.
    """

    values: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(ATTRIBUTES):
            raise ValueError(f'intent: expected {len(ATTRIBUTES)} values, found {self.values!r}')
        for attribute, value in zip(ATTRIBUTES, self.values, strict=True):
            if value != ANY and value not in attribute.values:
                raise ValueError(
                    f'intent, {attribute.name}: expected one of {(*attribute.values, ANY)}, found {value!r}'
                )
        if not self.cared:
            raise ValueError(f'intent: expected an attribute that matters, found {self.values!r}')

    @property
    def cared(self) -> tuple[int, ...]:
        """Numbers of the attributes that matter."""
        return tuple(number for number, value in enumerate(self.values) if value != ANY)

    @property
    def text(self) -> str:
        return ' '.join(f'{name} {value}' for name, value in zip(NAMES, self.values, strict=True))

    @classmethod
    def from_text(cls, text: str) -> 'Intent':
        """Parses an intent's `text`; other texts raise a ValueError."""
        values = tuple(text.split(' ')[1::2])
        if len(values) != len(NAMES) or text != ' '.join(f'{n} {v}' for n, v in zip(NAMES, values, strict=True)):
            form = ' '.join(f'{name} VALUE' for name in NAMES)
            raise ValueError(f'intent: expected text of the form {form!r}, found {text!r}')
        return cls(values)


def all_intents() -> Iterator[Intent]:
    """Enumerates all intents."""
    for values in itertools.product(*((*attribute.values, ANY) for attribute in ATTRIBUTES)):
        if set(values) != {ANY}:
            yield Intent(values)


ActKind = Literal['propose', 'ask', 'open', 'chatter']


@dataclasses.dataclass(frozen=True)
class Act:
    """The act of an assistant's message.

    Attributes:
        kind: 'propose' a place, 'ask' for attributes, ask an 'open' question, or 'chatter' for anything else.
        values: proposed value per attribute; None if it names none or two different ones.
        asked: numbers of the attributes asked for, in the order named.
    """

    kind: ActKind
    values: tuple[str | None, ...] = (None,) * len(ATTRIBUTES)
    asked: tuple[int, ...] = ()


def read_assistant(text: str) -> Act:
    """Parses any text as an act, by the first rule that applies.

    1. 'try' or 'how about': a proposal of all correctly spelled values in the message.
    2. 'which' or 'what' with names of attributes: a question for these attributes.
    3. 'what' with 'like': an open question.
    4. Anything else: chatter.
    """
    said = words(text)
    if 'try' in said or ('how', 'about') in itertools.pairwise(said):
        return Act('propose', values=_proposed(said))
    if 'which' in said or 'what' in said:
        asked = tuple(dict.fromkeys(NAMES.index(word) for word in said if word in NAMES))
        if asked:
            return Act('ask', asked=asked)
        if 'what' in said and 'like' in said:
            return Act('open')
    return Act('chatter')


def _proposed(said: Sequence[str]) -> tuple[str | None, ...]:
    found: list[set[str]] = [set() for _ in ATTRIBUTES]
    for word in said:
        if word in VALUE_OF:
            number, value = VALUE_OF[word]
            found[number].add(value)
    return tuple(next(iter(values)) if len(values) == 1 else None for values in found)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A user's statement about one attribute.

    Attributes:
        attribute: number of the attribute.
        value: the value named, or 'any'.
        denied: True if the user does not want this value.
        mistyped: True if it is spelled as a known typo.
    """

    attribute: int
    value: str
    denied: bool = False
    mistyped: bool = False


def read_user(text: str) -> Iterator[Statement]:
    """Parses any text: values, clean or mistyped, denied directly after 'not'; and 'any ATTRIBUTE'."""
    before = ''
    for word in words(text):
        spelled = _TYPO_OF.get(word, word)
        if spelled in VALUE_OF:
            number, value = VALUE_OF[spelled]
            yield Statement(number, value, denied=before == 'not', mistyped=spelled != word)
        elif before == ANY and word in NAMES:
            yield Statement(NAMES.index(word), ANY)
        before = word


def says_leave(text: str) -> bool:
    """True if a user's last message ends the conversation without accepting a place.

    An acceptance contains 'ok', 'great', 'perfect' or 'thanks', and not 'forget'. Any other text, or none, is a leave.
    """
    said = words(text)
    return 'forget' in said or not any(word in said for word in ('ok', 'great', 'perfect', 'thanks'))


def question(word: str, asked: Sequence[int]) -> str:
    """Formats a question: 'which food and price?'"""
    return f'{word} {" and ".join(NAMES[number] for number in asked)}?'


def proposal(word: str, values: Sequence[str]) -> str:
    """Formats a proposal, a value for each attribute: 'try cheap thai near station for dinner'."""
    food, price, area, time = values
    return f'{word} {price} {food} near {area} for {time}'
