"""The words of the concierge world: what can be wanted, how it is spelled and mistyped, and how either side is read.

All texts are lower-case ASCII words with a few of `, ?`. Reading knows words alone: other characters part them.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

ANY = 'any'  # in an intent: does not matter


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Something about a place that a person may care for.

    Attributes:
        name: what it is called in intents and questions.
        values: all equally likely in an intent.
        synonyms: another word for each value.
        cared: the probability that a person cares.
        lead: a word that may stand before a value, or none.
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

# What people say.
GREETINGS = ('hi', 'hello', 'hey')
LEAD_INS = ('i want', 'i need', 'looking for')
VAGUE_OPENINGS = ('i want to eat out', 'we need a table', 'looking for a place')
REMARKS = ('we are hungry', 'it is my birthday', 'my friend is visiting', 'so busy today', 'what a rainy day')
CORRECTIONS = ('no', 'um')
ACCEPTANCES = ('ok thanks', 'great thanks', 'perfect thanks')
LEAVE = 'forget it'

# What the scripted assistant says.
PROPOSALS = ('try', 'how about')
QUESTIONS = ('which', 'what')
OPEN_QUESTION = 'what would you like?'
CHATTER = ('sure, happy to help', 'let me think', 'one moment please', 'good to see you')

_WORD = re.compile('[a-z]+')


def words(text: str) -> list[str]:
    """The words of any text, in lower case."""
    return _WORD.findall(text.lower())


VALUE_OF: Mapping[str, tuple[int, str]] = {
    word: (number, value)
    for number, attribute in enumerate(ATTRIBUTES)
    for value, synonym in zip(attribute.values, attribute.synonyms, strict=True)
    for word in (value, synonym)
}  # every clean spelling of a value: the number of its attribute, and the value
SYNONYM_OF: Mapping[str, str] = {
    value: synonym
    for attribute in ATTRIBUTES
    for value, synonym in zip(attribute.values, attribute.synonyms, strict=True)
}


def clean_words() -> set[str]:
    """Every word that is spelled as it should be."""
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
    """Three typos of each value's word: a swap, a drop and a double of a letter after the first, in drawn order."""
    rng = random.Random('typos')
    taken = clean_words()
    typos = {}
    for word in VALUE_OF:
        found: list[str] = []
        for change in rng.sample((_swap, _drop, _double), 3):
            places = range(1, len(word) - (change is _swap))
            typo = next(t for at in rng.sample(places, len(places)) if (t := change(word, at)) not in taken)
            taken.add(typo)
            found.append(typo)
        typos[word] = tuple(found)
    return typos


TYPOS: Mapping[str, tuple[str, ...]] = _draw_typos()
TYPO_WEIGHTS = (0.5, 0.3, 0.2)
_TYPO_OF = {typo: word for word, typos in TYPOS.items() for typo in typos}


@dataclasses.dataclass(frozen=True)
class Intent:
    """What a person wants: per attribute a value, or 'any' where it does not matter.

    As text it reads 'food thai price cheap area any time dinner'.
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
        """The numbers of the attributes that matter."""
        return tuple(number for number, value in enumerate(self.values) if value != ANY)

    @property
    def text(self) -> str:
        return ' '.join(f'{name} {value}' for name, value in zip(NAMES, self.values, strict=True))

    @classmethod
    def from_text(cls, text: str) -> 'Intent':
        """The intent whose `text` this is; another text is a ValueError."""
        values = tuple(text.split(' ')[1::2])
        if len(values) != len(NAMES) or text != ' '.join(f'{n} {v}' for n, v in zip(NAMES, values, strict=True)):
            form = ' '.join(f'{name} VALUE' for name in NAMES)
            raise ValueError(f'intent: expected text of the form {form!r}, found {text!r}')
        return cls(values)


def all_intents() -> Iterator[Intent]:
    """Everything that one may want."""
    for values in itertools.product(*((*attribute.values, ANY) for attribute in ATTRIBUTES)):
        if set(values) != {ANY}:
            yield Intent(values)


ActKind = Literal['propose', 'ask', 'open', 'chatter']


@dataclasses.dataclass(frozen=True)
class Act:
    """What an assistant's message does.

    Attributes:
        kind: 'propose' a place, 'ask' for attributes, ask an 'open' question, or 'chatter': anything else.
        values: of a proposal: per attribute the value, None where it names none or two that differ.
        asked: of a question: the numbers of the attributes, in the order named.
    """

    kind: ActKind
    values: tuple[str | None, ...] = (None,) * len(ATTRIBUTES)
    asked: tuple[int, ...] = ()


def read_assistant(text: str) -> Act:
    """Reads any text as an act, by the first of these rules that fits.

    1. 'try' or 'how about' makes a proposal of the clean spellings of values that the whole message holds.
    2. 'which' or 'what', with the name of an attribute, asks for the attributes named.
    3. 'what' with 'like' is an open question.
    4. All else is chatter.
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
    """Something that a user's message says about one attribute.

    Attributes:
        attribute: its number.
        value: the value named, or 'any'.
        denied: it is what the user does not want.
        mistyped: it is spelled as one of the known typos.
    """

    attribute: int
    value: str
    denied: bool = False
    mistyped: bool = False


def read_user(text: str) -> Iterator[Statement]:
    """Reads any text: values, clean or mistyped, denied where 'not' stands right before; and 'any ATTRIBUTE'."""
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
    """Whether a user's message that ends a conversation takes leave without a place.

    An acceptance holds one of the words 'ok', 'great', 'perfect', 'thanks', and not 'forget'. Whoever ends with
    anything else (another text, none at all) has accepted nothing, and so leaves.
    """
    said = words(text)
    return 'forget' in said or not any(word in said for word in ('ok', 'great', 'perfect', 'thanks'))


def question(word: str, asked: Sequence[int]) -> str:
    """'which food and price?'"""
    return f'{word} {" and ".join(NAMES[number] for number in asked)}?'


def proposal(word: str, values: Sequence[str]) -> str:
    """'try cheap thai near station for dinner': a value for each attribute."""
    food, price, area, time = values
    return f'{word} {price} {food} near {area} for {time}'
