"""Replies of an assistant to the tasks, in the layout of the benchmark's own result files.

1. `generate` asks an endpoint, `sample` a model on the device. Each reply is kept in a cache as it comes, so that the
   same call continues after a kill.
2. `write_generations` writes the file, a JSON list with an object for each task; `read_generations` also reads files
   that the benchmark's code wrote.

A reply that could not be had is not in the file, and is no empty reply either. An empty reply in a file is the
assistant's own; an empty message of an endpoint is none, as nothing tells it from a fault of the server.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from simrl.conversations.completion import NoText
from simrl.conversations.records import Message
from simrl.evaluation.wildbench.tasks import Task, check_known
from simrl.remote.answers import Failure, Outcome
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.requests import ChatRequest
from simrl.rollouts.completion import Sampled
from simrl.rollouts.token_sampling import Sampling
from simrl.run.progress import Progress
from simrl.run.stage_files import write_json

DATASET = 'wild_bench_v2'
MAX_TOKENS = 2048  # of a reply, as in arXiv:2605.09808
Replies = Callable[[Sequence[Sequence[Message]], int], Sequence[Sampled | NoText]]  # chats, an attempt -> replies


@dataclasses.dataclass(frozen=True)
class Generation:
    """A reply to a task.

    Attributes:
        task: its session_id.
        text: the reply as it was sampled.
        generator: name of the assistant.
        truncated: max_tokens cut it; None: the file does not say.
    """

    task: str
    text: str
    generator: str
    truncated: bool | None = None


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Sampling of replies. Of arXiv:2605.09808 one release has temperature 1, another 0."""

    max_tokens: int = MAX_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        Sampling(self.temperature, top_p=self.top_p)  # refuses what is out of range
        if self.max_tokens < 1:
            raise ValueError(f'GenerationSettings.max_tokens: expected at least 1, found {self.max_tokens}')


def generate(
    tasks: Mapping[str, Task], endpoint: Endpoint, settings: GenerationSettings, name: str = ''
) -> tuple[list[Generation], collections.Counter[str]]:
    """Asks an endpoint for a reply to each task; also counts tasks without one by cause.

    Args:
        endpoint: with a cache, so that a call continues where a killed one was.
        name: of the progress lines; empty: none.

    Raises:
        EndpointError: the endpoint must be asked, and does not answer or has not the model.
    """
    sampling = Sampling(settings.temperature, top_p=settings.top_p)
    requests = [
        ChatRequest(messages=task.messages, max_tokens=settings.max_tokens, sampling=sampling)
        for task in tasks.values()
    ]
    endpoint.check_for(requests)
    return _generations(tasks, endpoint.call(requests, name), endpoint.settings.model)


def sample(
    tasks: Mapping[str, Task],
    replies: Replies,
    cache: Cache,
    *,
    generator: str,
    identity: str,
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[list[Generation], collections.Counter[str]]:
    """Samples a reply to each task on the device, as `generate` asks for one.

    Args:
        replies: `rollouts.completion.replies` of the assistant.
        cache: keeps replies as they come.
        generator: the assistant's name in the file.
        identity: all that decides a reply beside the chat: replies of others are not found in the cache.
        batch_size: chats for a call.
    """
    keys = {
        name: hashlib.sha256(json.dumps([identity, task.fingerprint]).encode()).hexdigest()
        for name, task in tasks.items()
    }
    outcomes: dict[str, Sampled | NoText] = {}
    waiting = []
    for name, key in keys.items():
        if (kept := cache.get(key)) is None:
            waiting.append(name)
        else:
            outcomes[name] = Sampled(**kept)
    for start in range(0, len(waiting), batch_size):
        names = waiting[start : start + batch_size]
        for name, reply in zip(names, replies([tasks[name].messages for name in names], 0), strict=True):
            if isinstance(reply, Sampled):
                cache.put(keys[name], dataclasses.asdict(reply), model=generator)
            outcomes[name] = reply
        if progress is not None:
            progress.update(len(names))
    return _generations(tasks, [outcomes[name] for name in tasks], generator)


def _generations(
    tasks: Mapping[str, Task], outcomes: Sequence[Outcome | Sampled | NoText], generator: str
) -> tuple[list[Generation], collections.Counter[str]]:
    """The outcomes of the tasks as generations, and the number of failures by cause."""
    found, failed = [], collections.Counter[str]()
    for task, outcome in zip(tasks, outcomes, strict=True):
        if isinstance(outcome, Failure | NoText):
            failed[outcome.cause] += 1
        else:
            found.append(Generation(task, outcome.text, generator, outcome.truncated))
    return found, failed


def write_generations(
    path: pathlib.Path, generations: Sequence[Generation], tasks: Mapping[str, Task], settings: GenerationSettings
) -> None:
    """Writes a result file, atomically."""
    configs = {
        'engine': None,
        'repetition_penalty': 1.0,
        'temperature': settings.temperature,
        'top_p': settings.top_p,
        'max_tokens': settings.max_tokens,
    }
    rows = [
        {
            'session_id': of.task,
            'chat_history': [message.content for message in tasks[of.task].messages],
            'model_input': 'n/a',
            'output': [of.text],
            'generator': of.generator,
            'configs': configs,
            'dataset': DATASET,
            'primary_tag': tasks[of.task].primary_tag,
            'truncated': of.truncated,
        }
        for of in generations
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)


def read_generations(
    path: pathlib.Path, tasks: Mapping[str, Task], dropped: Collection[str] = ()
) -> tuple[dict[str, Generation], int]:
    """Reads a result file by task, in the order of the tasks; also counts replies that are left out.

    Args:
        dropped: ids of rows that are no tasks, as of `read_tasks`: replies to them are left out.

    Raises:
        ValueError: an id is unknown or there twice, the rows are of several assistants, a row was written for another
            conversation than the task's, or it has no reply. It names the file, the row and the field.
    """
    rows = [parse_generation(row, f'{path}, row {number}') for number, row in enumerate(read_list(path), start=1)]
    found = [row for row in rows if row[0].task not in dropped]
    if not found:
        raise ValueError(f'{path}: expected replies to tasks, found {len(rows)}, all to rows that are none')
    check_known(tasks, [of.task for of, _ in found], str(path))
    if len(generators := sorted({of.generator for of, _ in found})) > 1:
        raise ValueError(f'{path}, generator: expected one, found {", ".join(generators[:5])}')
    for of, history in found:
        expected = [message.content for message in tasks[of.task].messages]
        if [text.strip() for text in history] != expected:
            raise ValueError(
                f'{path}, session_id {of.task!r}, chat_history: expected the {len(expected)} messages of the task, '
                f'found another conversation of {len(history)}'
            )
    by_task = {of.task: of for of, _ in found}
    return {name: by_task[name] for name in tasks if name in by_task}, len(rows) - len(found)


def parse_generation(row: Any, place: str) -> tuple[Generation, list[str]]:
    """Parses a row of a result file: the reply, and the texts that it answers.

    Raises:
        ValueError: a field is missing or wrong; it names the place and the field.
    """
    match row:
        case {'session_id': str(task), 'chat_history': list(history), 'output': output, 'generator': str(generator)}:
            pass
        case _:
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f'{place}: expected session_id, chat_history, output and generator, found {found}')
    outputs = output if isinstance(output, list) else [output]
    if len(outputs) != 1 or not isinstance(outputs[0], str):
        raise ValueError(f'{place}, output: expected a list of one text, found {str(output)[:60]}')
    if not all(isinstance(text, str) for text in history):
        raise ValueError(f'{place}, chat_history: expected texts, found {str(history)[:60]}')
    truncated = row.get('truncated')
    return Generation(task, outputs[0], generator, truncated if isinstance(truncated, bool) else None), history


def read_list(path: pathlib.Path) -> list[Any]:
    """Reads a JSON file with a list.

    Raises:
        ValueError: it is none.
    """
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: expected JSON, found {error}') from None
    if not isinstance(rows, list) or not rows:
        found = 'an empty one' if rows == [] else type(rows).__name__
        raise ValueError(f'{path}: expected a list of objects, found {found}')
    return rows


def missing(tasks: Mapping[str, Task], generations: Mapping[str, Generation]) -> list[str]:
    """Ids of the tasks without a reply."""
    return [name for name in tasks if name not in generations]


def generator_of(generations: Mapping[str, Generation]) -> str:
    """The name of the one assistant whose replies these are."""
    return next(iter(generations.values())).generator
