"""Judges that see the responses of two assistants, A and B, and say which served the user better.

1. `pair_prompt`: what was shared once, then what followed with each; every message a JSON value of its own.
2. `by_endpoints` asks judges behind endpoints for a JSON answer; `by_model` reads the verdict of a model on the device
   from the log-probabilities of the three answers that it may give.
3. `judge` has each pair judged in both orders. A pair with an empty response is decided without a judge, as in
   WildBench: it loses to one that is not empty, and ties with another empty one.

An answer without a verdict that can be read has none, and keeps its text; it is never scored.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.conversations.quoting import as_json
from simrl.conversations.records import Message
from simrl.evaluation.pairwise.responses import Pair, Response, Responses
from simrl.evaluation.wildbench.asking import AskSettings, JudgePrompt, ask, kept, prompt_of, shown
from simrl.remote.answers import Answer, Outcome
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.schema import object_of
from simrl.rewards.llm_judge import Read, batched_log_probs, prompt_row, reply_runs
from simrl.rollouts.agents import Policy
from simrl.run.progress import Progress

VERSION = '1'  # of the prompt; goes up with every change of a word
VALUES = {'A': 1.0, 'tie': 0.5, 'B': 0.0}  # of a verdict, as the preference for A
NO_RESPONSE = 'no response'
NOT_ASKED = 'an empty response is not judged'
BATCHES = 8  # of a model's prompts, between two writes of its answers

INSTRUCTION = """\
You compare two AI assistants, A and B. Both were given the same messages, and from there each went on by itself, in a
conversation of its own with the same user. What they share comes first, with the user's goal if it is known; then all
that followed with A; then all that followed with B.
Ask which of them left the user better off. It works on what the user is after. What it says is true, and of use to that
user. It costs the user no more reading, asking and repeating than the matter needs.
Which one comes first says nothing, and neither is better for writing more or for praising the user.
A verdict of tie is for two that you would not choose between."""
JSON_END = (
    'Answer with a JSON object: "thought", your reasons in one to three sentences, then "verdict": "A", "B" or "tie".'
)
WORD_END = 'Answer with the verdict alone: A, B or tie.'
SCHEMA = object_of(thought={'type': 'string', 'minLength': 1}, verdict={'type': 'string', 'enum': list(VALUES)})


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judge's answer on two responses.

    Attributes:
        value: the preference for A, from 0 to 1; None: there is none.
        choice: 'A', 'B' or 'tie', the most probable one of a model's; None without a verdict.
        cause, detail: why there is none; NOT_ASKED of one that no judge gave.
        raw: the text of the answer.
        log_probs: of a model, by answer, in nats.
    """

    value: float | None
    choice: str | None
    cause: str = ''
    detail: str = ''
    raw: str = ''
    log_probs: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A verdict on a pair. `first_is_a`: the pair's first assistant was shown as A, before the other."""

    pair: Pair
    first_is_a: bool
    judge: str
    verdict: Verdict

    @property
    def preference(self) -> float:
        """The preference for the pair's first assistant; NaN without a verdict."""
        value = self.verdict.value
        return float('nan') if value is None else value if self.first_is_a else 1 - value

    def row(self) -> dict[str, Any]:
        """The verdict as a line of a file."""
        names = (self.pair.first, self.pair.second)
        a, b = names if self.first_is_a else names[::-1]
        return {
            'id': self.pair.id,
            'cluster': self.pair.cluster,
            'A': a,
            'B': b,
            'judge': self.judge,
            'version': VERSION,
            'verdict': self.verdict.choice,
            'preference for A': self.verdict.value,
            'cause': self.verdict.cause,
            'detail': self.verdict.detail,
            'raw': self.verdict.raw,
            'log_probs': dict(self.verdict.log_probs),
        }


Judges = Callable[[Sequence[tuple[Response, Response]]], Mapping[str, Sequence[Verdict]]]  # (A, B) -> by judge


def pair_prompt(a: Response, b: Response, end: str, settings: AskSettings) -> str:
    """Writes the prompt of a judge of two responses to one prompt.

    Args:
        end: how to answer.
        settings: for the number of words that judges see of a message of A or B.
    """

    def after(name: str, rest: Sequence[Message]) -> list[str]:
        own = [(of.role, shown(of.content, settings) if of.role == 'assistant' else of.content) for of in rest]
        return [as_json({name: {role: text}}) for role, text in own]

    goal = [] if a.intent is None else [as_json({'goal of the user': a.intent})]
    shared = [as_json({message.role: message.content}) for message in a.prompt]
    return prompt_of(INSTRUCTION, [*goal, *shared, *after('A', a.rest), *after('B', b.rest)], end)


def by_endpoints(
    asked: Sequence[tuple[Response, Response]], endpoints: Mapping[str, Endpoint], settings: AskSettings, name: str = ''
) -> dict[str, list[Verdict]]:
    """The verdicts of judges behind endpoints, by their names.

    Args:
        asked: the responses of A and B.
        endpoints: each with a cache, so that a call continues where a killed one was.
        name: of the progress lines; empty: none.
    """
    prompts = [JudgePrompt(pair_prompt(a, b, JSON_END, settings), SCHEMA, f'pair-{VERSION}') for a, b in asked]
    found = ask(endpoints, prompts, settings, name)
    return {judge: list(map(_verdict, outcomes)) for judge, outcomes in found.items()}


def _verdict(outcome: Outcome) -> Verdict:
    if isinstance(outcome, Answer):
        return Verdict(VALUES[outcome.value['verdict']], outcome.value['verdict'], raw=outcome.text)
    return Verdict(None, None, outcome.cause, kept(outcome).get('detail', ''), outcome.raw)


def by_model(
    asked: Sequence[tuple[Response, Response]],
    policy: Callable[[], Policy],
    chat: Chat,
    settings: AskSettings,
    cache: Cache,
    *,
    read: Read,
    identity: str,
    lengths: Sequence[int],
    batch_size: int,
    mesh: Mesh,
    name: str,
) -> list[Verdict]:
    """The verdicts of a model on the device: its distribution over the three answers, each with the end-of-turn.

    Args:
        asked: the responses of A and B.
        policy: loads the model, of `llm_judge.judge_agent` and `for_sampling`; called if an answer is missing.
        chat: its own.
        cache: keeps log-probabilities as they come.
        read: 'argmax': the most probable answer; 'expected': the mean preference under the distribution.
        identity: all that decides an answer beside the prompt: those of others are not found in the cache.
        lengths, batch_size: as of `llm_judge.local_judge`. What is too long has no verdict, and is never cut.
        name: of the progress lines.
    """
    runs = reply_runs(chat, list(VALUES))
    prompts = [pair_prompt(a, b, WORD_END, settings) for a, b in asked]
    keys = [hashlib.sha256(json.dumps([identity, VERSION, prompt]).encode()).hexdigest() for prompt in prompts]
    found: dict[str, Mapping[str, float]] = {}
    rows: dict[str, np.ndarray] = {}
    faults: dict[str, Verdict] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        if (kept := cache.get(key)) is not None:
            found[key] = kept['log_probs']
            continue
        row = prompt_row(chat, prompt, lengths[-1] - max(map(len, runs)))
        if isinstance(row, np.ndarray):
            rows[key] = row
        else:
            faults[key] = Verdict(None, None, row.cause, row.detail)
    waiting = sorted(rows, key=lambda key: len(rows[key]))
    if waiting:
        model = policy()
        with Progress(name, len(asked), done=len(asked) - len(waiting)) as progress:
            for start in range(0, len(waiting), BATCHES * batch_size):
                some = waiting[start : start + BATCHES * batch_size]
                values = batched_log_probs(
                    model, [rows[key] for key in some], runs=runs, lengths=lengths, batch_size=batch_size, mesh=mesh
                )
                for key, value in zip(some, values.tolist(), strict=True):
                    found[key] = dict(zip(VALUES, value, strict=True))
                    cache.put(key, {'log_probs': found[key]}, model=identity)
                progress.update(len(some))
    return [faults[key] if key in faults else verdict_of(found[key], read) for key in keys]


def verdict_of(log_probs: Mapping[str, float], read: Read) -> Verdict:
    """The verdict of the answers' log-probabilities; the first of equally probable ones in the order of `VALUES`."""
    choice = max(VALUES, key=lambda answer: log_probs[answer])
    weights = {answer: np.exp(log_probs[answer] - log_probs[choice]) for answer in VALUES}
    mean = sum(weights[answer] * value for answer, value in VALUES.items()) / sum(weights.values())
    return Verdict(float(mean) if read == 'expected' else VALUES[choice], choice, raw=choice, log_probs=log_probs)


def judge(responses: Mapping[str, Responses], pairs: Sequence[Pair], judges: Judges) -> list[Judged]:
    """Has each pair judged in both orders, one after the other, by each judge."""
    questions = [(pair, first_is_a) for pair in pairs for first_is_a in (True, False)]
    asked: list[tuple[Response, Response]] = []
    known: list[Verdict | None] = []
    for pair, first_is_a in questions:
        names = (pair.first, pair.second) if first_is_a else (pair.second, pair.first)
        a, b = (responses[name].get(pair.id) for name in names)
        verdict = _without_asking(names, a, b)
        known.append(verdict)
        if verdict is None:
            assert a is not None
            assert b is not None
            asked.append((a, b))
    found = {name: iter(verdicts) for name, verdicts in judges(asked).items()}
    return [
        Judged(*question, name, next(verdicts) if verdict is None else verdict)
        for name, verdicts in found.items()
        for question, verdict in zip(questions, known, strict=True)
    ]


def _without_asking(names: Sequence[str], a: Response | None, b: Response | None) -> Verdict | None:
    """The verdict on a pair that no judge is asked about: one with an empty response, or without one."""
    if a is None or b is None:
        missing = ' and '.join(name for name, response in zip(names, (a, b), strict=True) if response is None)
        return Verdict(None, None, NO_RESPONSE, f'of {missing}')
    empty = [response.num_characters == 0 for response in (a, b)]
    if not any(empty):
        return None
    choice = 'tie' if all(empty) else 'B' if empty[0] else 'A'
    return Verdict(VALUES[choice], choice, NOT_ASKED)


def causes(judged: Sequence[Judged]) -> collections.Counter[str]:
    """The number of questions without a verdict, by cause."""
    return collections.Counter(of.verdict.cause for of in judged if of.verdict.value is None)
