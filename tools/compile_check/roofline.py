"""The least seconds of an RL step on a machine, from its peaks: each phase by its operations or by its bytes.

Every prompt and message is as long as it may be. What is counted is what the work needs (`tools.benchmark.limits`) and
not what the programs do: no recomputation, no room of caches that is empty. A data-parallel group of `model` devices
computes its own rows with all weights. Attention of whole rows is counted once, causally.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models.abstract import ITEM_BYTES
from simrl.rollouts.schedule import MOST_STEPS
from tools.benchmark.limits import (
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
from tools.compile_check.hlo import ONCE, Sent
from tools.compile_check.machines import Chip
from tools.compile_check.measure import Measured
from tools.compile_check.peers import Peers
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


def step_limits(work: Work, group: Group, user: Group | None = None) -> Mapping[str, Limit]:
    """The least seconds of each phase of a step, by the name of what is done.

    Args:
        user: the devices of the simulator, where they are laid out otherwise; None: `group`.
    """
    groups = {'user': user or group, 'assistant': group}
    rollout = [
        (name, groups[side], phases)
        for side, of in groups.items()
        for name, phases in _rollout(work, of)
        if phases and name.startswith(side)
    ]
    found = {name: of.limit(list(phases)) for name, of, phases in rollout}
    return found | {name: group.limit([phase]) for name, phase in _training(work, group)}


def _weights(work: Work, name: str) -> tuple[Weights, int]:
    spec = work.models()[name].policy.spec
    return weights_of(spec.config), ITEM_BYTES[spec.execution.dtype]


def _rollout(work: Work, group: Group) -> Iterator[tuple[str, list[Phase]]]:
    pieces, rows = work.rows // work.rows_at_once, work.rows_at_once // group.data
    present = {name: role for name, role in SIDES.items() if work.side(role) is not None}
    for name, role in present.items():
        weights, item = _weights(work, name)
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
    if work.text_user is not None:  # it feeds its whole view for each message
        weights, item = _weights(work, 'user')
        before = [message.before[ASSISTANT] for message in walk(work) if message.role == USER]
        steps, fed = [], []
        for tokens in before:
            steps += decoding(weights, rows=rows, cached=tokens, steps=work.user_tokens, item=item)
            fed.append(prefilling(weights, rows=rows, cached=0, tokens=tokens, item=item))
        yield 'user: sampling', steps * pieces
        yield 'user: its views', fed * pieces


def _training(work: Work, group: Group) -> Iterator[tuple[str, Phase]]:
    settings = work.rl.algorithm
    weights, _ = _weights(work, 'assistant')
    item, tokens = ITEM_BYTES[work.compute.training.dtype], work.capacity(ASSISTANT)
    trained = work.limits.turns * work.limits.assistant_tokens
    rows, number = work.rows // group.data, settings.minibatches * settings.microbatches
    pairs = tokens * (tokens + 1) // 2
    forward = 2 * (weights.layers * tokens + weights.head * trained) + weights.attention * pairs
    read = number * (weights.layers + weights.head) * item
    if passes := settings.reads_old + (settings.kl != 'none'):
        yield 'old and reference passes', Phase(passes * rows * forward, passes * read)
    yield 'gradients', Phase(settings.epochs * 3 * rows * forward, settings.epochs * 2 * read)
    steps = settings.epochs * settings.minibatches
    yield 'optimizer', Phase(0.0, steps * OPTIMIZER_BYTES * weights.stored / group.data)
    if work.frame is not None:
        yield 'reward model', Phase(rows * (2 * weights.layers * tokens + weights.attention * pairs), read)


def sent_seconds(work: Work, program: Measured, chip: Chip) -> float:
    """Seconds of a step that a program's collectives take at least, all its links busy; latency not counted."""
    found = sent_in_step(work, program)
    return sum(wire_bytes(kind, peers.number, sent.size) for (kind, peers), sent in found.items()) / chip.links


def sent_in_step(work: Work, program: Measured) -> Mapping[tuple[str, Peers], Sent]:
    """A program's collectives of a whole step on one device, by kind and devices.

    A loop runs as often as a message has tokens, or parts of `feed_chunk` tokens.
    """
    found: dict[tuple[str, Peers], Sent] = {}
    for (scope, kind, peers), sent in program.sent.items():
        times = program.calls * (1 if scope == ONCE else rounds_of(work, program.name, scope))
        number, size = found.get((kind, peers), Sent(0.0, 0.0))
        found[kind, peers] = Sent(number + times * sent.number, size + times * sent.size)
    return found


def wire_bytes(kind: str, devices: int, size: float) -> float:
    """Bytes that a device sends in a collective, as rings do it.

    An all-gather passes on all shares but one, and so does a reduce-scatter; an all-reduce is the one after the other,
    a broadcast a scatter and an all-gather. Of an all-to-all a device keeps its own share. A permutation sends all.
    Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, 2005.

    Args:
        devices: in a group.
        size: of `Sent`.
    """
    if kind == 'collective-permute':
        return size
    return (2 if kind in ('all-reduce', 'collective-broadcast') else 1) * size * (devices - 1) / devices


def rounds_of(work: Work, name: str, scope: str) -> int:
    """Rounds of a loop of unknown length at most, in a call of a program; 1 where nothing is known of it."""
    what, _, side = name.partition('/')
    last = scope.rpartition('/')[2]
    spec = work.assistant.policy.spec
    sampled = work.max_new_tokens[side == 'assistant']
    if last == 'decode':
        return min(MOST_STEPS, sampled) if what == 'block' else sampled + 1
    if last == 'feed' and what in ('message', 'hear') and 'receive' in scope:
        hears = work.side(USER) if side == 'assistant' else work.assistant
        return 1 if hears is None else -(-sampled // hears.policy.spec.feed_chunk)
    if last == 'feed' and what == 'start':
        return -(-work.limits.prompt_tokens // spec.feed_chunk)
    return 1
