"""The least seconds of an RL step on a machine, from its peaks: each phase by its operations or by its bytes.

Every prompt and message is as long as it may be. What is counted is what the work needs (`tools.benchmark.limits`) and
not what the programs do: no recomputation, no room of caches that is empty. A data-parallel group of `model` devices
computes its own rows with all weights. Attention of whole rows is counted once, causally.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from simrl.conversations.chat import ASSISTANT, USER
from tools.benchmark.limits import (
    ITEM_BYTES,
    OPTIMIZER_BYTES,
    Limit,
    Phase,
    Rates,
    Weights,
    decoding,
    limit_of,
    prefilling,
    weights_of,
)
from tools.compile_check.hlo import ONCE, Found
from tools.compile_check.machines import Chip
from tools.compile_check.measure import Measured
from tools.compile_check.work import SIDES, Work, walk


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that compute the same rows: `model` of them, of which there are `data` groups."""

    chip: Chip
    data: int
    model: int

    @property
    def rates(self) -> Rates:
        return Rates(self.chip.flops * self.model, self.chip.bandwidth * self.model)

    def limit(self, phases: Sequence[Phase]) -> Limit:
        return limit_of(phases, self.rates)


def step_limits(work: Work, group: Group) -> Mapping[str, Limit]:
    """The least seconds of each phase of a step, by the name of what is done."""
    found = {name: group.limit(list(phases)) for name, phases in _rollout(work, group) if phases}
    return found | {name: group.limit([phase]) for name, phase in _training(work, group)}


def _weights(work: Work, role: int) -> tuple[Weights, int]:
    agent = work.side(role)
    assert agent is not None
    spec = agent.policy.spec
    return weights_of(spec.config), ITEM_BYTES[spec.execution.dtype]


def _rollout(work: Work, group: Group) -> Iterator[tuple[str, list[Phase]]]:
    pieces, rows = work.rows // work.rows_at_once, work.rows_at_once // group.data
    present = {name: role for name, role in SIDES.items() if work.side(role) is not None}
    for name, role in present.items():
        weights, item = _weights(work, role)
        partner = USER if role == ASSISTANT else ASSISTANT
        heard, sampled = work.max_new_tokens[partner == ASSISTANT], work.max_new_tokens[role == ASSISTANT]
        steps: list[Phase] = []
        fed = [prefilling(weights, rows=rows, cached=0, tokens=work.limits.prompt_tokens, item=item)]
        for message in walk(work):
            if message.role == role:
                steps += decoding(weights, rows=rows, cached=message.before[role], steps=sampled, item=item)
            else:
                fed.append(prefilling(weights, rows=rows, cached=message.before[role], tokens=heard, item=item))
        yield f'{name}: sampling', steps * pieces
        yield f'{name}: prompts and hearing', fed * pieces


def _training(work: Work, group: Group) -> Iterator[tuple[str, Phase]]:
    settings, role = work.rl.algorithm, ASSISTANT
    weights, _ = _weights(work, role)
    item, tokens = ITEM_BYTES[work.compute.training.dtype], work.capacity(role)
    trained = work.limits.turns * work.limits.assistant_tokens
    rows, number = work.rows // group.data, settings.minibatches * settings.microbatches
    pairs = tokens * (tokens + 1) // 2
    forward = 2 * (weights.layers * tokens + weights.head * trained) + weights.attention * pairs
    read = number * (weights.layers + weights.head) * item
    old = settings.updates_per_batch > 1 or settings.advantage == 'gae' or settings.kl == 'k1'
    if passes := old + (settings.kl != 'none'):
        yield 'old and reference passes', Phase(passes * rows * forward, passes * read)
    yield 'gradients', Phase(settings.epochs * 3 * rows * forward, settings.epochs * 2 * read)
    steps = settings.epochs * settings.minibatches
    yield 'optimizer', Phase(0.0, steps * OPTIMIZER_BYTES * weights.stored / group.data)
    if work.frame is not None:
        yield 'reward model', Phase(rows * (2 * weights.layers * tokens + weights.attention * pairs), read)


def sent_seconds(work: Work, program: Measured, chip: Chip) -> float:
    """Seconds of a step that a program's collectives take at least, all its links busy; latency not counted.

    A loop runs as often as a message has tokens, or parts of `feed_chunk` tokens.
    """
    once = _seconds(program.sent, ONCE, chip)
    scopes = {scope for scope, _ in program.sent if scope != ONCE}
    rounds = sum(rounds_of(work, program.name, scope) * _seconds(program.sent, scope, chip) for scope in scopes)
    return program.calls * (once + rounds)


def rounds_of(work: Work, name: str, scope: str) -> int:
    """Rounds of a loop of unknown length at most, in a call of a program; 1 where nothing is known of it."""
    role = SIDES.get(name.partition('/')[2])
    last = scope.rpartition('/')[2]
    chunks = {side: agent.policy.spec.feed_chunk for side in SIDES.values() if (agent := work.side(side)) is not None}
    if role is not None and last == 'decode':
        return work.max_new_tokens[role == ASSISTANT] + 1
    if role is not None and last == 'feed' and 'receive' in scope:
        hears = USER if role == ASSISTANT else ASSISTANT
        return -(-work.max_new_tokens[role == ASSISTANT] // chunks[hears])
    if name == 'start' and last == 'feed':
        return -(-work.limits.prompt_tokens // min(chunks.values()))
    return 1


def _seconds(sent: Found, scope: str, chip: Chip) -> float:
    """An all-reduce sends its bytes twice: a reduce-scatter and an all-gather."""
    return sum(
        (2 if kind == 'all-reduce' else 1) * found.size / chip.links
        for (of, kind), found in sent.items()
        if of == scope
    )
