"""Responses of assistants by id: replies to prompts, or whole conversations with users.

1. `read_responses` reads those of one assistant: rows of a file, WildBench's result layout, or the conversations that a
   stage of a run keeps for the report.
2. `compared` lists the pairs of responses of each two assistants; they must answer the same prompts.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from simrl.conversations.records import ROLES, Message
from simrl.conversations.row_files import placed_rows
from simrl.evaluation.wildbench.generations import parse_generation

# Messages that all assistants were given: the user's first; all before the last reply; or none, as from a simulated
# user that writes its own opening. A leading system message is always given.
Given = Literal['opening', 'history', 'nothing']
OnMissing = Literal['raise', 'failure']
FIELDS = ('id', 'messages', 'person', 'intent')  # of a row of a file
RESULT_FILE = 'result.json'  # of a stage
NOT_KEPT = 'conversations that the stage does not keep'
SHOWN_LENGTH = 60  # characters of a text in an error


@dataclasses.dataclass(frozen=True)
class Response:
    """A reply to a prompt, or a conversation with a user.

    Attributes:
        messages: an optional system message, then from the user's opening on.
        given: number of leading messages that all assistants were given.
        person: who wrote the prompt, or was the user; None: not known.
        intent: the user's goal, if known.
        place: its file and row.
    """

    messages: tuple[Message, ...]
    given: int
    person: str | None
    intent: str | None
    place: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[: self.given]

    @property
    def rest(self) -> tuple[Message, ...]:
        return self.messages[self.given :]

    @property
    def num_characters(self) -> int:
        """Characters of the assistant's own messages; 0 for an empty response."""
        return sum(len(message.content.strip()) for message in self.rest if message.role == 'assistant')


@dataclasses.dataclass(frozen=True)
class Pair:
    """The responses of two assistants to one prompt.

    Attributes:
        id: of the prompt.
        cluster: what intervals resample: the person; where not known the opening; without one the id.
        person: see `Response`.
        first, second: names of the assistants.
    """

    id: str
    cluster: str
    person: str | None
    first: str
    second: str


Responses = Mapping[str, Response]  # of one assistant, by id


def read_responses(
    path: pathlib.Path, given: Given = 'opening'
) -> tuple[dict[str, Response], collections.Counter[str]]:
    """Reads the responses of one assistant by id; also counts what a stage does not keep.

    Args:
        path: .jsonl, .jsonl.gz or .parquet with rows `{id, messages: [{role, content}], person?, intent?}`; .json in
            WildBench's result layout; a stage's folder or its result.json, which has the conversations that the report
            shows.
        given: of rows. In WildBench's layout the history is given, in a stage the opening.

    Raises:
        ValueError: a row is none of these, or an id is there twice; it names the row and the field. Or no response has
            text: the file has prompts alone.
    """
    path = path / RESULT_FILE if path.is_dir() else path
    counts = collections.Counter[str]()
    if path.suffix == '.json':
        content = _json(path)
        rows = _generations(path, content) if isinstance(content, list) else _shown(path, content, counts)
    else:
        rows = (_row(place, row, given) for place, row in placed_rows(path, FIELDS))
    found: dict[str, Response] = {}
    for name, response in rows:
        if name in found:
            raise ValueError(f'{response.place}: expected another id, found {name!r} again, as in {found[name].place}')
        found[name] = response
    if not found:
        raise ValueError(f'{path}: expected at least one response, found none')
    if not any(response.num_characters for response in found.values()):
        raise ValueError(f'{path}: expected messages of an assistant, found none with text in {len(found)} rows')
    return found, +counts


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: expected JSON, found {error}') from None


def _row(place: str, row: Mapping[str, Any], given: Given) -> tuple[str, Response]:
    name = row.get('id')
    if not isinstance(name, str) or not name:
        raise ValueError(f'{place}, id: expected a text that is not empty, found {name!r}')
    for field in ('person', 'intent'):
        if not isinstance(row.get(field), str | None):
            raise ValueError(f'{place}, {field}: expected a text or none, found {row[field]!r}')
    place = f'{place}, id {name!r}'
    messages = _messages(place, row.get('messages'))
    return name, Response(messages, _given(place, messages, given), row.get('person'), row.get('intent'), place)


def _messages(place: str, values: Any) -> tuple[Message, ...]:
    """Messages as they are: an empty one is the speaker's own."""
    if not isinstance(values, list) or not values:
        raise ValueError(f'{place}, messages: expected a list of objects, found {str(values)[:SHOWN_LENGTH]}')
    messages = []
    for number, value in enumerate(values):
        match value:
            case {'role': str(role), 'content': str(content)} if role in ROLES:
                messages.append(Message(role, content))  # type: ignore[arg-type]  # a role of ROLES
            case _:
                raise ValueError(
                    f'{place}, message {number}: expected a role of {", ".join(ROLES)} and a content, found '
                    f'{str(value)[:SHOWN_LENGTH]}'
                )
    roles = [message.role for message in messages]
    start = int(roles[0] == 'system')
    if 'system' in roles[start:] or roles[start : start + 1] != ['user']:
        raise ValueError(
            f'{place}, messages: expected an optional system message, then the user first, found the roles '
            f'{", ".join(roles[:5])}'
        )
    return tuple(messages)


def _given(place: str, messages: Sequence[Message], given: Given) -> int:
    start = int(messages[0].role == 'system')
    if given == 'history':
        if messages[-1].role != 'assistant':
            raise ValueError(f"{place}, messages: expected the assistant's reply at the end, found the user's message")
        return len(messages) - 1
    return start + (given == 'opening')


def _generations(path: pathlib.Path, rows: Sequence[Any]) -> Iterator[tuple[str, Response]]:
    for number, row in enumerate(rows, start=1):
        place = f'{path}, row {number}'
        generation, history = parse_generation(row, place)
        # A history ends with the user's message; one of an even length begins with the system's.
        roles = (['system'] if len(history) % 2 == 0 else []) + ['user', 'assistant'] * (len(history) // 2 + 1)
        values = [{'role': role, 'content': text} for role, text in zip(roles, history, strict=False)]
        messages = _messages(f'{place}, chat_history', values)
        response = (*messages, Message('assistant', generation.text))
        yield generation.task, Response(response, len(messages), None, None, f'{place}, id {generation.task!r}')


def _shown(path: pathlib.Path, content: Any, counts: collections.Counter[str]) -> Iterator[tuple[str, Response]]:
    """The conversations that a stage keeps, without a message that ended one: its partner never read that."""
    match content:
        case {'outcomes': {'example': list(names), 'cluster': list(clusters), 'end': list(ends)}, 'shown': list(shown)}:
            end_of, cluster_of = (dict(zip(names, values, strict=True)) for values in (ends, clusters))
        case _:
            raise ValueError(f"{path}: expected WildBench's result layout or a stage with conversations, found neither")
    counts[NOT_KEPT] = len(names) - len(shown)
    for number, row in enumerate(shown, start=1):
        place = f'{path}, conversation {number}'
        match row:
            case {'example': example, 'messages': list(values)} if example in end_of:
                heard = values[:-1] if end_of[example] == 'signal' else values
                person = example if cluster_of[example] == example else None  # else its cluster is its opening
                told = {'id': example, 'intent': row.get('intent'), 'person': person}
                yield _row(place, {**told, 'messages': heard}, 'opening')
            case _:
                raise ValueError(f'{place}: expected an example of the stage and its messages, found {str(row)[:60]}')


def compared(
    responses: Mapping[str, Responses], *, against: str | None = None, on_missing: OnMissing = 'raise'
) -> list[Pair]:
    """Lists the pairs to judge: of each two assistants, of each id.

    Args:
        responses: by assistant.
        against: the one whom all others are compared with; None: each two assistants.
        on_missing: of an id that some assistants have no response to: 'raise' an error; or keep it, where one of two
            assistants has a response, as a pair that no judge can have a verdict on.

    Raises:
        ValueError: fewer than two assistants, none of the name `against`, ids that differ, or an id with other prompts,
            intents or persons; it names the places.
    """
    if len(responses) < 2:
        raise ValueError(f'expected responses of at least two assistants, found {", ".join(responses) or "none"}')
    if against is not None and against not in responses:
        raise ValueError(f'against: expected one of {", ".join(responses)}, found {against!r}')
    first_of: dict[str, Response] = {}
    for own in responses.values():
        for name, response in own.items():
            _check_same(first_of.setdefault(name, response), response)
    for assistant, own in responses.items():
        if on_missing == 'raise' and (missing := [name for name in first_of if name not in own]):
            raise ValueError(
                f'{assistant}: expected a response to each id, found none to {missing[0]!r} of '
                f'{first_of[missing[0]].place} (missing: {len(missing)} of {len(first_of)}); '
                '--on_missing=failure counts them as failures'
            )
    if against is None:
        twos = list(itertools.combinations(responses, 2))
    else:
        twos = [(assistant, against) for assistant in responses if assistant != against]
    pairs = [
        Pair(name, _cluster(name, response), response.person, *two)
        for two in twos
        for name, response in first_of.items()
        if name in responses[two[0]] or name in responses[two[1]]
    ]
    for two in twos:
        if not any(name in responses[two[1]] for name in responses[two[0]]):
            raise ValueError(f'{" and ".join(two)}: expected ids with responses of both, found none')
    return pairs


def _check_same(first: Response, other: Response) -> None:
    for what in ('prompt', 'intent', 'person'):
        values = [_told(getattr(response, what)) for response in (first, other)]
        if values[0] != values[1]:
            raise ValueError(f'{other.place}: expected the {what} of {first.place}, found {_difference(*values)}')


def _told(value: Any) -> Any:
    return [(message.role, message.content.strip()) for message in value] if isinstance(value, tuple) else value


def _difference(expected: Any, found: Any) -> str:
    if not isinstance(found, list):
        return f'{found!r} in the place of {expected!r}'
    if len(expected) != len(found):
        return f'{len(found)} messages in the place of {len(expected)}'
    number = next(i for i, (x, y) in enumerate(zip(expected, found, strict=True)) if x != y)
    return f'another message {number}: {found[number][1][:SHOWN_LENGTH]!r}'


def _cluster(name: str, response: Response) -> str:
    if response.person is not None:
        return f'person {response.person}'
    opening = next((message.content.strip() for message in response.prompt if message.role == 'user'), None)
    return f'id {name}' if opening is None else f'opening {opening}'


def unit_of(pairs: Sequence[Pair]) -> str:
    """The clusters of pairs in words, in the plural, such as 'people and openings'."""
    words = {'person': 'people', 'opening': 'openings', 'id': 'prompts'}
    kinds = {pair.cluster.partition(' ')[0] for pair in pairs}
    return ' and '.join(word for kind, word in words.items() if kind in kinds)
