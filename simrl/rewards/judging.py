"""Conversations of rollouts as questions to a judge, and its verdicts as rewards, whichever judge it is.

1. `questions` takes what is to be judged from transcripts: conversations, or each reply given what was before it.
2. A `Judge` answers each with a score, or with the cause why there is none.
3. `rewards_of` writes verdicts into `Rewards`; a conversation without a verdict is masked, with its cause.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from simrl.conversations.records import Example
from simrl.models import placement
from simrl.rewards.rewards import CAUSES, FAILED, NO_REPLY, Judging, Rewards
from simrl.rewards.rubric import Subject
from simrl.rollouts.state import Transcript
from simrl.rollouts.trajectories import Trajectories, transcript_of, transcripts

Unit = Literal['conversation', 'turn']  # a reward for each conversation, or for each reply in it


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation to judge, or its last reply.

    Attributes:
        example: id of the example that the conversation started from.
        intent: the user's goal, if known.
        messages: (role, text) from the user's opening.
        subject: what is scored.
    """

    example: str
    intent: str | None
    messages: tuple[tuple[str, str], ...]
    subject: Subject = 'conversation'


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's answer.

    Attributes:
        score: from 0 to 1; None: there is none.
        parts: numbers that the score is made of, by name; the same names in every verdict with a score.
        cause: one of `CAUSES`, '' with a score.
        detail: the reason in the judge's own words, where it has one.
    """

    score: float | None
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cause: str = ''
    detail: str = ''


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge of conversations.

    Attributes:
        submit: takes questions; returns a function that waits for their verdicts, in the same order.
        parts: names of `Verdict.parts`.
    """

    submit: Callable[[Sequence[Question]], Callable[[], Sequence[Verdict]]]
    parts: tuple[str, ...] = ()


def heard(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(role, text) of a conversation of `transcripts`, without a message that ended it: the partner never read that."""
    messages = row['messages'][:-1] if row['end_reason'] == 'signal' else row['messages']
    return tuple((message['role'], message['content']) for message in messages)


def questions(
    rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], unit: Unit
) -> dict[tuple[int, int], Question]:
    """Lists the questions of conversations by (row, turn); the turn is 0 where conversations are judged as wholes.

    Conversations that a failure ended, and those without a reply, have none.
    """
    found = {}
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        messages = heard(row)
        if row['end_reason'] == 'failure' or len(messages) < 2:
            continue
        if unit == 'conversation':
            found[number, 0] = Question(example.id, example.intent, messages)
            continue
        for turn in range(len(messages) // 2):
            found[number, turn] = Question(example.id, example.intent, messages[: 2 * turn + 2], 'reply')
    return found


def rewards_of(
    verdicts: Mapping[tuple[int, int], Verdict],
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[str],
    *,
    unit: Unit,
    turns: int,
) -> tuple[Rewards, dict[int, str]]:
    """Verdicts by (row, turn) as rewards on the host, `[B]` or `[B, turns]`; and by row why it has none, in words.

    A row's cause is that of its first reply without a verdict.

    Args:
        rows: conversations of `transcripts`.
        parts: names of the verdicts' parts.
    """
    shape = (len(rows),) if unit == 'conversation' else (len(rows), turns)
    value, valid = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    kept = {name: np.zeros(shape, np.float32) for name in parts}
    cause: np.ndarray = np.full(len(rows), CAUSES.index(NO_REPLY), np.int32)
    cause[[row['end_reason'] == 'failure' for row in rows]] = CAUSES.index(FAILED)
    details: dict[int, str] = {}
    judged = {row for row, _ in verdicts}
    cause[sorted(judged)] = 0
    for (row, turn), verdict in sorted(verdicts.items()):
        place = row if unit == 'conversation' else (row, turn)
        if verdict.score is None:
            cause[row] = cause[row] or CAUSES.index(verdict.cause)
            details.setdefault(row, verdict.detail or verdict.cause)
            continue
        value[place], valid[place] = verdict.score, True
        for name, array in kept.items():
            array[place] = verdict.parts[name]
    on_host: dict[str, Any] = {'value': value, 'valid': valid, 'parts': kept, 'cause': cause}
    return Rewards(**on_host), details


def shared(judge: Judge) -> Judge:
    """The judge for a job of several processes: each asks a share of the questions, and all get all verdicts."""
    count = jax.process_count()
    if count == 1:
        return judge

    def submit(questions: Sequence[Question]) -> Callable[[], list[Verdict]]:
        wait_for_own = judge.submit(questions[jax.process_index() :: count])

        def wait() -> list[Verdict]:
            own: dict[str, Any] = {'error': None, 'verdicts': []}
            error = None
            try:
                own['verdicts'] = [dataclasses.asdict(verdict) for verdict in wait_for_own()]
            except Exception as found:  # which would leave the other processes waiting
                error, own['error'] = found, f'{type(found).__name__}: {found}'
            everyone = _gathered(own)
            if errors := [part['error'] for part in everyone if part['error'] is not None]:
                raise error or RuntimeError(f'a judge in another of {count} processes: {errors[0]}')
            verdicts = [Verdict(None)] * len(questions)
            for process, part in enumerate(everyone):
                verdicts[process::count] = [Verdict(**verdict) for verdict in part['verdicts']]
            return verdicts

        return wait

    return Judge(submit, judge.parts)


def _gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, by process."""
    from jax.experimental import multihost_utils

    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(content)])).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def judging(
    judge: Judge,
    decode: Callable[[Sequence[int]], str],
    unit: Unit,
    shape: Callable[[Rewards, Transcript], Rewards] = lambda rewards, _: rewards,
) -> Judging:
    """A judge as the score of a training run. Rows past the examples, which fill up a batch, are not judged.

    Args:
        decode: ids to text, such as `Chat.decode` of the agents.
        shape: changes the rewards of conversations on the host, such as `shaping.shaped`.
    """

    def start(batch: Trajectories, examples: Sequence[Example]) -> Callable[[], tuple[Rewards, Mapping[int, str]]]:
        transcript = placement.to_host(transcript_of(batch))
        transcript = jax.tree.map(lambda x: x[: len(examples)], transcript)
        rows = transcripts(transcript, decode)
        asked = questions(rows, examples, unit)
        wait = judge.submit(list(asked.values()))

        def finish() -> tuple[Rewards, Mapping[int, str]]:
            verdicts = dict(zip(asked, wait(), strict=True))
            turns = transcript.messages.shape[1] // 2
            rewards, details = rewards_of(verdicts, rows, judge.parts, unit=unit, turns=turns)
            return jax.device_get(shape(rewards, transcript)), details

        return finish

    return Judging(start)
