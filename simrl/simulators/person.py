"""Parts of the system text of a prompted simulator, each made from an example: of the person that it plays.

All draws are by the example's `persona_seed`, so that all conversations of an example's group meet the same person.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example
from simrl.simulators.fine_tuned import told_intent
from simrl.simulators.prompts import FEW_SHOT, GUIDELINES, INTENT, MANNER, NOTHING_KNOWN, PERSONA

Part = Callable[[Example], str]  # an example -> a part of the text; empty: nothing
Intent = Literal['none', 'where_known', 'required']  # what a simulator is told of the intent

TRIES_PER_MESSAGE = 8  # draws for one message of few-shot, some of which are too long or the example's own


@dataclasses.dataclass(frozen=True)
class FewShotSettings:
    """Real messages of other people in the prompt."""

    messages: int = 8  # most messages shown
    tokens: int = 160  # most tokens of all of them together

    def __post_init__(self) -> None:
        for field in ('messages', 'tokens'):
            if getattr(self, field) < 1:
                raise ValueError(f'FewShotSettings.{field}: expected at least 1, found {getattr(self, field)}')


@dataclasses.dataclass(frozen=True)
class Spoken:
    """One person's messages to an assistant, for few-shot prompts."""

    id: str
    opening: str
    messages: tuple[str, ...]


def draw(seed: int, purpose: str, number: int) -> int:
    """A number below `number`, by the seed; draws of different purposes are independent."""
    digest = hashlib.sha256(f'{purpose}:{seed}'.encode()).digest()
    return int.from_bytes(digest[:8], 'big') % number


def about(parts: Sequence[Part]) -> Part:
    """All that is known of the person of an example, as one text."""

    def text(example: Example) -> str:
        known = [found for part in parts if (found := part(example))]
        return '\n\n'.join(known) or NOTHING_KNOWN

    return text


def intent_part(intent: Intent) -> Part:
    """The intent, where it is known or of every example, which then needs one."""
    if intent == 'none':
        return lambda example: ''
    if intent == 'required':
        return lambda example: f'{INTENT}\n{told_intent(example)}'
    return lambda example: '' if example.intent is None else f'{INTENT}\n{example.intent}'


def guideline_part(names: Sequence[str]) -> Part:
    """One of the named `GUIDELINES`, drawn uniformly for each example."""
    return lambda example: f'{MANNER}\n{GUIDELINES[names[draw(example.persona_seed, "guideline", len(names))]]}'


def persona_part(personas: Sequence[str]) -> Part:
    """One of the descriptions, drawn uniformly for each example."""
    return lambda example: f'{PERSONA}\n{personas[draw(example.persona_seed, "persona", len(personas))]}'


def read_personas(path: pathlib.Path) -> list[str]:
    """Reads descriptions of people: a `.txt` file with one a line, or `.jsonl` with rows `{"persona": text}`.

    Raises:
        ValueError: a row is no description, or there is none; it names the file and line.
    """
    if path.suffix not in ('.txt', '.jsonl'):
        raise ValueError(f'{path}: expected a name that ends in .txt or .jsonl')
    rows = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b'\n')  # text would also split at U+2028
    if not rows[-1]:
        rows.pop()
    personas = [_persona(row, f'{path}, line {number}', path.suffix) for number, row in enumerate(rows, start=1)]
    if not personas:
        raise ValueError(f'{path}: expected at least one persona, found none')
    return personas


def _persona(row: bytes, place: str, suffix: str) -> str:
    try:
        text = row.decode()
        value = json.loads(text) if suffix == '.jsonl' else text
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, no JSON, or deep nesting
        raise ValueError(f'{place}: expected {"JSON" if suffix == ".jsonl" else "UTF-8"}, found: {error}') from None
    if suffix == '.jsonl':
        if not isinstance(value, dict) or 'persona' not in value:
            raise ValueError(f"{place}: expected an object with the field 'persona', found {text[:60]!r}")
        value = value['persona']
        if not isinstance(value, str):
            raise ValueError(f'{place}: persona: expected a string, found {type(value).__name__}')
    persona: str = value.strip()
    if not persona:
        raise ValueError(f'{place}: expected a persona, found an empty one')
    if (half := next((c for c in persona if '\ud800' <= c <= '\udfff'), None)) is not None:
        raise ValueError(f'{place}: expected Unicode, found half of a surrogate pair, {half!r}')
    return persona


def spoken_of(conversations: Iterable[Conversation], *, openings: bool) -> list[Spoken]:
    """The whole messages of people, of those who have any.

    Args:
        openings: True counts openings among them.
    """
    people = []
    for conversation in conversations:
        own = conversation.spoken[0 if openings else 2 :: 2]
        if messages := tuple(message.content for message in own if not message.truncated):
            people.append(Spoken(conversation.id, conversation.opening, messages))
    return people


def few_shot_part(settings: FewShotSettings, people: Sequence[Spoken], chat: Chat) -> Part:
    """Messages of other people, drawn for each example; never of its own conversation, nor of one with its opening.

    People are drawn first, then one of their messages, so that long conversations do not prevail.
    """

    @functools.cache  # a message is drawn for many examples
    def num_tokens(message: str) -> int:
        return len(chat.encode(f'{message}\n'))

    def text(example: Example) -> str:
        random = np.random.default_rng([draw(example.persona_seed, 'few-shot', 2**32)])
        shown: list[str] = []
        used: set[int] = set()
        left = settings.tokens
        for _ in range(TRIES_PER_MESSAGE * settings.messages):
            number = int(random.integers(len(people)))
            person = people[number]
            message = '- ' + person.messages[random.integers(len(person.messages))].replace('\n', '\n  ')
            if number in used or example.id == person.id or example.opening == person.opening:
                continue
            if (tokens := num_tokens(message)) > left:
                continue
            used.add(number)
            shown.append(message)
            left -= tokens
            if len(shown) == settings.messages:
                break
        if not shown:
            raise ValueError(
                f'example {example.id}: expected a message of another person of at most {settings.tokens} tokens, '
                f'found none among {len(people)} people'
            )
        return '\n'.join([FEW_SHOT, *shown])

    return text
