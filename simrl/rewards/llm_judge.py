"""A language model on the device as a judge: the expected score under its distribution over the scores 0 to 10.

1. A judge's prompt is a row of the judge's own chat template, which ends with the header of its reply.
2. `score_log_probs` computes the log-probability of each score's text with the end-of-turn after it. The prompt is fed
   once; beginnings that the texts share are fed once as well.
3. A softmax over the eleven log-probabilities is the judge's distribution; its mean over 10 is the verdict.

The end-of-turn matters: without it 1 would have the probability of 10 as well.

Letters: B rows, T tokens of a prompt, C chains of tokens that are fed after it, P predicted tokens.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, Chat, EncodingError
from simrl.conversations.views import natural_prompt
from simrl.models import placement, transformer
from simrl.models.cache import Cache
from simrl.models.log_probs import token_log_probs
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rewards.judging import Judge, Question, Verdict
from simrl.rewards.rewards import JUDGE_FAILED, TOO_LONG
from simrl.rewards.rubric import HIGHEST, Rubric, judge_prompt
from simrl.rollouts.agents import ModelAgent, Policy, model_agent
from simrl.rollouts.collect import for_sampling
from simrl.rollouts.context import last_token, prefill
from simrl.rollouts.token_sampling import Sampling

Read = Literal['expected', 'argmax']  # the mean of the distribution over scores, or its most probable score
Runs = tuple[tuple[int, ...], ...]


def judge_agent(chat: Chat, config: TransformerConfig, params: Params, execution: Execution) -> ModelAgent:
    """A model as a judge, which speaks under the assistant's header and may write every token of its tokenizer.

    Raises:
        ValueError: the template ends replies with text.
    """
    longest = max(map(len, score_runs(chat)))
    agent = model_agent(
        chat, config, params, execution, role=ASSISTANT, max_new_tokens=longest, sampling=Sampling(temperature=1.0)
    )
    token_mask = np.arange(config.padded_vocab_size) < chat.tokenizer.size
    return dataclasses.replace(agent, policy=dataclasses.replace(agent.policy, token_mask=token_mask))


def reply_runs(chat: Chat, replies: Sequence[str]) -> Runs:
    """The tokens of each reply, its end-of-turn included."""
    return tuple((*chat.encode(reply, 'assistant'), chat.end_of_turn['assistant']) for reply in replies)


def score_runs(chat: Chat) -> Runs:
    """The tokens of each score from 0 to 10 as a reply."""
    return reply_runs(chat, [str(score) for score in range(HIGHEST + 1)])


def prompt_tokens(chat: Chat, prompt: str) -> np.ndarray:
    """A judge's prompt up to its reply, int32 `[T]`."""
    return np.concatenate([natural_prompt(chat, prompt).tokens, np.array(chat.header('assistant'), np.int32)])


def prompt_row(chat: Chat, prompt: str, most: int) -> np.ndarray | Verdict:
    """`prompt_tokens`; where there are more than `most`, or none, the verdict that says so."""
    try:
        row = prompt_tokens(chat, prompt)
    except EncodingError as error:
        return Verdict(None, cause=JUDGE_FAILED, detail=f'{JUDGE_FAILED}: {error}')
    if len(row) <= most:
        return row
    return Verdict(None, cause=TOO_LONG, detail=f'{TOO_LONG}: expected at most {most} tokens, found {len(row)}')


def chains_of(runs: Runs) -> tuple[Runs, list[tuple[int, int]]]:
    """Lists the token chains to feed after a prompt, such that each beginning of a run is in one of them.

    Returns:
        The chains; and for each token of each run, in order, the chain and the number of its tokens that precede it.
    """
    beginnings = {run[:-1] for run in runs}
    chains = tuple(sorted(x for x in beginnings if not any(y[: len(x)] == x for y in beginnings - {x})))

    def place(before: tuple[int, ...]) -> tuple[int, int]:
        return next(i for i, chain in enumerate(chains) if chain[: len(before)] == before), len(before)

    return chains, [place(run[:i]) for run in runs for i in range(len(run))]


@functools.partial(jax.jit, static_argnames='runs')
def score_log_probs(policy: Policy, tokens: jax.Array, length: jax.Array, *, runs: Runs) -> jax.Array:
    """The log-probability of each run as the continuation of each row, float32 `[B, len(runs)]`, in nats.

    Args:
        policy: from `judge_agent` and `for_sampling`.
        tokens: int32 `[B, T]`, left-aligned, with room for the longest run after each row.
        length: int32 `[B]`, at least 1.
    """
    spec, (chains, places) = policy.spec, chains_of(runs)
    longest = max(map(len, chains))
    fed = np.array([(*chain, *[0] * (longest - len(chain))) for chain in chains], np.int32)
    count = np.array([len(chain) for chain in chains], np.int32)
    no_role = jnp.zeros(tokens.shape, jnp.int8)
    context = prefill(policy, tokens, no_role, no_role, length, capacity=tokens.shape[1])
    pending, offset = last_token(context.tokens, length), np.arange(longest + 1)

    def feed(cache: Cache, chain: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        """Feeds a chain after the row's last token, over the chain before it: no query reads past its own position."""
        own, number = chain
        row = jnp.concatenate([pending[:, None], jnp.broadcast_to(own, (len(length), longest))], axis=1)
        positions = jnp.where(offset <= number, length[:, None] - 1 + offset, cache.capacity)
        hidden, written = transformer.apply(policy.params, spec.config, spec.execution, row, positions, cache)
        assert written is not None
        return written, hidden

    _, hidden = jax.lax.scan(feed, context.cache, (jnp.asarray(fed), jnp.asarray(count)))  # [C, B, longest + 1, D]
    chain, before = np.array(places).T
    predicting = jnp.moveaxis(hidden[chain, :, before], 0, 1)  # [B, P, D]
    targets = jnp.broadcast_to(jnp.array([token for run in runs for token in run]), predicting.shape[:2])
    log_prob, _ = token_log_probs(
        policy.params,
        predicting,
        targets,
        jnp.ones(targets.shape, bool),
        jnp.asarray(policy.token_mask),
        chunk=spec.execution.log_prob_chunk,
    )
    ends = np.cumsum([len(run) for run in runs])[:-1].tolist()
    return jnp.stack([jnp.sum(part, axis=1) for part in jnp.split(log_prob, ends, axis=1)], axis=1)


def batched_log_probs(
    policy: Policy, rows: Sequence[np.ndarray], *, runs: Runs, lengths: Sequence[int], batch_size: int, mesh: Mesh
) -> np.ndarray:
    """`score_log_probs` of rows in length buckets, float32 `[len(rows), len(runs)]`.

    Args:
        rows: int32 tokens, each with room for the longest run in the longest bucket.
        lengths: ascending; one program is compiled for each that occurs.
        batch_size: rows of a program; the last batch of a bucket is filled up with copies.
    """
    out = np.zeros((len(rows), len(runs)), np.float32)
    room = max(map(len, runs))
    buckets = collections.defaultdict(list)
    for number in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        buckets[next(length for length in lengths if len(rows[number]) + room <= length)].append(number)
    with jax.set_mesh(mesh):
        for width, members in buckets.items():
            for start in range(0, len(members), batch_size):
                chosen = members[start : start + batch_size]
                padded = [rows[i] for i in (*chosen, *chosen[:1] * (batch_size - len(chosen)))]
                tokens = np.stack([np.pad(row, (0, width - len(row))) for row in padded])
                batch = placement.shard_batch((tokens, np.array([len(row) for row in padded], np.int32)), mesh)
                out[chosen] = placement.to_host(score_log_probs(policy, *batch, runs=runs))[: len(chosen)]
    return out


def verdict_of(log_probs: np.ndarray, read: Read) -> Verdict:
    """The verdict of the scores' log-probabilities, `[HIGHEST + 1]`.

    Its part `mass` is the probability that the judge answers with a score at all.
    """
    log_probs = log_probs.astype(np.float64)
    highest = log_probs.max()
    weights = np.exp(log_probs - highest)
    score = weights @ np.arange(HIGHEST + 1) / weights.sum() if read == 'expected' else float(np.argmax(weights))
    return Verdict(float(score) / HIGHEST, {'mass': float(np.exp(highest) * weights.sum())})


@dataclasses.dataclass
class _Submitted:
    """The rows of some questions, or their verdicts where there is no row; and all verdicts, once there are."""

    rows: list[np.ndarray | Verdict]
    verdicts: list[Verdict] | None = None


def local_judge(
    agent: ModelAgent,
    chat: Chat,
    rubric: Rubric,
    *,
    read: Read,
    lengths: Sequence[int],
    batch_size: int,
    mesh: Mesh,
) -> Judge:
    """A model on the device as a judge. A conversation that is too long for it is not judged, and never cut.

    What is submitted is judged when the first of it is waited for, all of it together: the pieces of a step fill the
    judge's batches.

    Args:
        agent: from `judge_agent`, of any tokenizer: it reads texts.
        chat: its own.
        lengths: ascending lengths of rows in tokens, prompt and score; the last is the most that is judged.
        batch_size: rows judged at once.
    """
    runs = score_runs(chat)
    with jax.set_mesh(mesh):
        policy = for_sampling(agent, mesh).policy
    room = max(map(len, runs))

    def row_of(question: Question) -> np.ndarray | Verdict:
        prompt = judge_prompt(rubric, question.intent, question.messages, question.subject, 'number')
        return prompt_row(chat, prompt, lengths[-1] - room)

    submitted: list[_Submitted] = []

    def judge_submitted() -> None:
        rows = [row for own in submitted for row in own.rows if isinstance(row, np.ndarray)]
        found = iter(batched_log_probs(policy, rows, runs=runs, lengths=lengths, batch_size=batch_size, mesh=mesh))
        for own in submitted:
            own.verdicts = [row if isinstance(row, Verdict) else verdict_of(next(found), read) for row in own.rows]
        submitted.clear()

    def submit(questions: Sequence[Question]) -> Callable[[], list[Verdict]]:
        own = _Submitted([row_of(question) for question in questions])
        submitted.append(own)

        def wait() -> list[Verdict]:
            if own.verdicts is None:
                judge_submitted()
            assert own.verdicts is not None
            return own.verdicts

        return wait

    return Judge(submit, ('mass',))
