"""A panel of judges behind endpoints: each gives a thought and a score from 0 to 10 as JSON; the reward is their mean.

An answer that breaks the schema (a score like 7.5, one out of range, other fields) is a failure, kept raw and never
mended. A question that any judge of the panel failed has no verdict: a mean over fewer judges would be another measure.
"""

import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from simrl.conversations.records import Message
from simrl.remote.answers import Answer, Failure, Outcome, reason_of
from simrl.remote.client import Endpoint
from simrl.remote.requests import ChatRequest
from simrl.remote.schema import object_of
from simrl.rewards.judging import Judge, Question, Verdict, shared
from simrl.rewards.rewards import JUDGE_FAILED
from simrl.rewards.rubric import HIGHEST, JUDGE_PART, Rubric, judge_prompt
from simrl.rollouts.token_sampling import Sampling
from simrl.run.stage_files import named_errors

SCHEMA = object_of(
    thought={'type': 'string', 'minLength': 1}, score={'type': 'integer', 'minimum': 0, 'maximum': HIGHEST}
)


class Judgements:
    """The raw judgements of a run, one question a line, for people and later analyses.

    A resumed run asks again what its last checkpoint does not know, and the cache answers: lines that are there already
    are not written twice. Several processes may append to one file, and any of them may be killed within a line.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._written = set[bytes]()  # digests of the lines up to `_end`
        self._end = 0

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows that are not in the file yet."""
        lines = [json.dumps(row).encode() + b'\n' for row in rows]
        with named_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, 'a+b') as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read(file)
                new = [line for line in dict.fromkeys(lines) if _digest(line) not in self._written]
                file.write(b''.join(new))

    def _read(self, file: BinaryIO) -> None:
        """Reads what was appended since, by any process. The rest of a line that a kill cut is removed."""
        if os.fstat(file.fileno()).st_size < self._end:  # the file was deleted, or cut
            self._written, self._end = set(), 0
        file.seek(self._end)
        for line in file:
            if line.endswith(b'\n'):
                self._written.add(_digest(line))
                self._end += len(line)
        file.truncate(self._end)


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).digest()


def request_of(rubric: Rubric, question: Question, max_tokens: int) -> ChatRequest:
    """The request for a judge's answer: one message of the user, at temperature 0."""
    prompt = judge_prompt(rubric, question.intent, question.messages, question.subject, 'json')
    return ChatRequest(
        messages=(Message('user', prompt),),
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0.0),
        schema=SCHEMA,
        version=f'{rubric.name}-{rubric.version}',
    )


def verdict_of(outcomes: Mapping[str, Outcome]) -> Verdict:
    """The verdict of a panel, by its judges' outcomes: the mean score, and each judge's as a part."""
    failed = {name: reason_of(outcome) for name, outcome in outcomes.items() if isinstance(outcome, Failure)}
    if failed:
        reasons = ', '.join(f'judge {name}: {reason}' for name, reason in failed.items())
        return Verdict(None, cause=JUDGE_FAILED, detail=f'{JUDGE_FAILED}: {reasons}')
    parts = {_part(name): score_of(outcome) / HIGHEST for name, outcome in outcomes.items()}
    return Verdict(sum(parts.values()) / len(parts), parts)


def score_of(outcome: Outcome) -> int:
    """The score of an answer that fits the schema."""
    assert isinstance(outcome, Answer)
    score: int = outcome.value['score']
    return score


def _part(judge: str) -> str:
    return f'{JUDGE_PART}{judge}'


def kept_row(question: Question, rubric: Rubric, models: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> dict:
    """A line of `Judgements`."""
    judges = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, Answer):
            judges[name] = {'model': models[name], **outcome.value}
        else:
            failure = {'cause': outcome.cause, 'detail': outcome.detail, 'raw': outcome.raw}
            judges[name] = {'model': models[name], 'score': None, **failure}
    return {
        'rubric': rubric.name,
        'version': rubric.version,
        'example': question.example,
        'subject': question.subject,
        'score': verdict_of(outcomes).score,
        'judges': judges,
        'intent': question.intent,
        'messages': [{'role': role, 'content': text} for role, text in question.messages],
    }


def panel(
    endpoints: Mapping[str, Endpoint], rubric: Rubric, *, max_tokens: int, judgements: Judgements | None = None
) -> Judge:
    """Endpoints by the judges' names as one judge. Questions are asked of all at once, in the background.

    Of several processes each asks a share of them.

    Args:
        max_tokens: max tokens of an answer, reasoning included.
        judgements: file of the raw judgements; None: they are not kept.
    """
    models = {name: endpoint.settings.model for name, endpoint in endpoints.items()}

    def submit(questions: Sequence[Question]) -> Callable[[], list[Verdict]]:
        requests = [request_of(rubric, question, max_tokens) for question in questions]
        pending = {name: endpoint.submit(requests) for name, endpoint in endpoints.items()}

        def wait() -> list[Verdict]:
            found = {name: calls.result() for name, calls in pending.items()}
            by_question = [{name: outcomes[i] for name, outcomes in found.items()} for i in range(len(questions))]
            if judgements is not None:
                pairs = zip(questions, by_question, strict=True)
                judgements.append([kept_row(question, rubric, models, outcomes) for question, outcomes in pairs])
            return [verdict_of(outcomes) for outcomes in by_question]

        return wait

    return shared(Judge(submit, tuple(map(_part, endpoints))))
