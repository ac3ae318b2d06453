"""A step's seconds on larger slices, on paper: as many conversations a chip as on the slice that was compiled for.

Of a number of chips (`scaled`):

- computing: the roofline's seconds (`roofline.step_limits`), as every chip has the rows that it had. Only the
  optimizer's fall, whose state is split over more chips.
- moving: the bytes that rings send (`roofline.wire_bytes`) over the links that they can use. Devices with the same
  rows, `model` of them, lie in a line and stay as many (`line`); all other collectives are through the slice (`rings`).
  A permutation over `data` takes the two links of one ring.
- waiting: a collective takes `START_SECONDS`, and `HOP_SECONDS` for each link on its way (`hops`): through the slice,
  or through the devices with the same rows. A permutation goes to the neighbour, and over `data` there is one for each
  other shard.
- host: every process reads all conversations of a step, however many chips there are, at `HOST_SECONDS` a token.

Nothing overlaps in the sum, which is therefore no lower bound; computing alone is.

The paper's pair on v5p as N x 1, with 40 conversations a chip, 8 of them in flight, all messages as long as they may be
(2026-12-01, from the programs for 2x2x2):

    python -m tools.compile_check --config=configs/paper.py:sftuser-14b --topology=v5p:2x2x2 --mesh=8x1
        --config.compute.rows_in_flight=64 --layers=2 --chips=8,16,32,64,128,256

| chips | conversations | sampling | other computing | moving | waiting | host | all | efficiency |
|---|---|---|---|---|---|---|---|---|
| 8 (2x2x2) | 320 | 479.6 | 107.3 | 6.6 | 3.5 | 2.0 | 598.9 | 1.00 |
| 16 (2x2x4) | 640 | 479.6 | 107.3 | 7.1 | 6.9 | 3.9 | 604.8 | 0.99 |
| 32 (2x4x4) | 1,280 | 479.6 | 107.3 | 7.3 | 13.7 | 7.9 | 615.7 | 0.97 |
| 64 (4x4x4) | 2,560 | 479.6 | 107.3 | 6.9 | 27.0 | 15.7 | 636.5 | 0.94 |
| 128 (4x4x8) | 5,120 | 479.6 | 107.3 | 6.9 | 53.6 | 31.5 | 678.9 | 0.88 |
| 256 (4x8x8) | 10,240 | 479.6 | 107.3 | 7.0 | 106.5 | 62.9 | 763.3 | 0.78 |

First to break is waiting: products with parameters that are split over `data` are 12,000 permutations in the passes and
gradients of a microbatch on 8 chips, and as many more as there are shards. Then the host. Without more conversations it
is the rows: minibatches of 80 go over data=16 at most, and over 8 with microbatches of 8.
On v5e as N x 8, from 8x8, with 5 conversations a chip and --chips=64,128,256, 64 to 256 chips take 381 to 393 s: of
these the collectives among the 8 move for 64 and wait for 76, which is as long on any slice.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from jax.sharding import Mesh

from simrl.run.config import ConfigError
from tools.compile_check.check import Checked
from tools.compile_check.hlo import Sent
from tools.compile_check.machines import Topology
from tools.compile_check.peers import Peers
from tools.compile_check.roofline import Group, sent_in_step, step_limits, wire_bytes

# Slices as they are sold: https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e (2026-11).
_FLAT = {8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
SLICES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    'v5e': _FLAT,
    'v5p': {8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)},
    'v6e': _FLAT,
}
CLOSED = {'v5e': 16, 'v5p': 4, 'v6e': 16}  # a side of a multiple of so many chips is a ring; v5p: if all sides are
START_SECONDS = 5e-6  # with three hops the 8 us of an all-reduce among four chips
HOP_SECONDS = 1e-6
HOST_SECONDS = 4e-7  # to decode a token with a tokenizer of Hugging Face, measured on one core
BROKEN = 0.8  # of the first slice's conversations a second and chip: with less a slice wastes more than a fifth


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A step on a slice.

    Attributes:
        shape: of the slice, in chips.
        data: groups of devices that have rows of their own.
        rows: conversations of the step.
        seconds: by part.
    """

    chips: int
    shape: tuple[int, ...]
    data: int
    rows: int
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def check_chips(topology: Topology, mesh: Mesh, chips: Sequence[str]) -> None:
    """Refuses numbers of chips that the step cannot be estimated on.

    Args:
        mesh: that programs are compiled for.

    Raises:
        ConfigError: there is no such slice, or there are no shards whose collectives could be followed.
    """
    data, model = mesh.shape['data'], mesh.shape['model']
    known = [str(x) for x in SLICES.get(topology.name.partition(':')[0], {}) if x > model]
    for number in chips:
        if number not in known:
            raise ConfigError(
                f'--chips: expected numbers of chips of {topology.name}: {", ".join(known) or "none"}; found {number!r}'
            )
    if chips and data == 1:
        raise ConfigError(f'--chips: expected a mesh with data above 1, whose collectives grow, found {data}x{model}')


def rings(kind: str, shape: Sequence[int]) -> float:
    """The share of a chip's links that rings use: both of a closed side, one of another, none of a side of 1."""
    used = sum(2 if closed else 1 for size, closed in zip(shape, _closed(kind, shape), strict=True) if size > 1)
    return used / (2 * len(shape))


def line(kind: str, shape: Sequence[int], number: int) -> float:
    """The share of a chip's links that a ring of `number` chips in a line uses: both where they are a closed side."""
    closes = any(closed and size == number for size, closed in zip(shape, _closed(kind, shape), strict=True))
    return (2 if closes else 1) / (2 * len(shape))


def _closed(kind: str, shape: Sequence[int]) -> list[bool]:
    closes = [size % CLOSED[kind] == 0 for size in shape]
    return closes if kind != 'v5p' or all(closes) else [False] * len(shape)


def hops(shape: Sequence[int]) -> int:
    """Links between the corners of a slice, from neighbour to neighbour."""
    return sum(size - 1 for size in shape)


def scaled(checked: Checked, chips: int) -> Scaled:
    """The step of an arm on another slice of the same chips, with `model` as it is and as many rows a device.

    Args:
        checked: compiled for a mesh whose `data` is above 1.
        chips: of `SLICES`.
    """
    chip, kind = checked.topology.chip, checked.topology.name.partition(':')[0]
    assert chip is not None
    work, shape, data = checked.work, SLICES[kind][chips], chips // checked.model
    growth = data / checked.data
    user = None if checked.simulator is None else Group(chip, *checked.simulator)
    limits = step_limits(work, Group(chip, checked.data, checked.model), user)
    computing = {name: limit.seconds / (growth if name == 'optimizer' else 1.0) for name, limit in limits.items()}
    moving = waiting = 0.0
    for program in checked.programs.values():
        for (collective, peers), sent in sent_in_step(work, program).items():
            mesh = checked.mesh_of(program.name)
            on_links, waits = _sending(collective, peers, sent, kind=kind, shape=shape, mesh=mesh, growth=growth)
            moving, waiting = moving + on_links / chip.links, waiting + waits
    rows = round(work.rows * growth)
    tokens = rows * work.limits.turns * (work.limits.assistant_tokens + work.user_tokens)
    sampling = sum(seconds for name, seconds in computing.items() if name.endswith('sampling'))
    seconds = {
        'sampling': sampling,
        'other computing': sum(computing.values()) - sampling,
        'moving': moving,
        'waiting': waiting,
        'host': tokens * HOST_SECONDS,
    }
    return Scaled(chips, shape, data, rows, seconds)


def _sending(
    collective: str,
    peers: Peers,
    sent: Sent,
    *,
    kind: str,
    shape: Sequence[int],
    mesh: tuple[int, int],
    growth: float,
) -> tuple[float, float]:
    """Bytes that a device sends, over the share of its links that they take; and seconds of waiting.

    Args:
        shape: of the larger slice.
        mesh: data and model, of the slice that was compiled for.
        growth: of `data`.
    """
    data, model = mesh
    permutes = collective == 'collective-permute'
    if peers.reach <= model:
        size, way = wire_bytes(collective, peers.number, sent.size), 1 if permutes else peers.reach - 1
        return size / line(kind, shape, model), sent.number * (START_SECONDS + HOP_SECONDS * way)
    if permutes:  # more of them, of smaller shards, by two of all links
        more = (growth * data - 1) / (data - 1)
        return sent.size * more / growth * len(shape), sent.number * more * (START_SECONDS + HOP_SECONDS)
    size = wire_bytes(collective, max(1, round(growth * peers.number)), sent.size)
    return size / rings(kind, shape), sent.number * (START_SECONDS + HOP_SECONDS * hops(shape))


def efficiency(one: Scaled, first: Scaled) -> float:
    """Conversations a second and chip, of those on the first slice."""
    return (one.rows / one.total / one.chips) / (first.rows / first.total / first.chips)


def scaling_text(checked: Checked, numbers: Sequence[int]) -> Iterator[str]:
    """The table of a step by chips, and what breaks first."""
    found = [scaled(checked, chips) for chips in numbers]
    yield f'Seconds of a step with {checked.work.rows / checked.data / checked.model:g} conversations a chip:'
    yield ''
    parts = list(found[0].seconds)
    columns = ('chips', 'mesh', 'conversations', *parts, 'all', 'efficiency')
    yield f'| {" | ".join(columns)} |'
    yield f'|{"---|" * len(columns)}'
    for one in found:
        sizes = 'x'.join(map(str, one.shape))
        seconds = ' | '.join(f'{one.seconds[part]:.1f}' for part in parts)
        yield (
            f'| {one.chips} ({sizes}) | {one.data}x{checked.model} | {one.rows:,} | {seconds} | {one.total:.1f} | '
            f'{efficiency(one, found[0]):.2f} |'
        )
    yield ''
    yield breaks_first(found)
    yield same_batch(checked)


def breaks_first(found: Sequence[Scaled]) -> str:
    """The part that grows most, and from how many chips on a fifth is lost."""
    first, last = found[0], found[-1]
    grown = max(last.seconds, key=lambda part: last.seconds[part] - first.seconds[part])
    slow = next((one for one in found if efficiency(one, first) < BROKEN), None)
    where = 'none of these loses a fifth' if slow is None else f'from {slow.chips} chips on a fifth or more is lost'
    return f'First to break: {grown}, from {first.seconds[grown]:.1f} to {last.seconds[grown]:.1f} s a step; {where}.'


def same_batch(checked: Checked) -> str:
    """The most chips that the step's own conversations can be split over, in words."""
    work = checked.work
    settings = work.rl.algorithm
    most = math.gcd(work.rows // settings.minibatches, 2**16)
    now = math.gcd(work.rows_of_microbatch, 2**16)
    return (
        f'Without more conversations: minibatches of {work.rows // settings.minibatches} rows go over data={most} at '
        f'most (with microbatches={settings.microbatches} over {now}), which is {most * checked.model} chips with '
        f'model={checked.model}.'
    )
