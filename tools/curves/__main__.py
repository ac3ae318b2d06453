"""Curves of time and memory over sizes that ought to cost nothing, or no more than their share.

    python -m tools.curves --output=DIR [--curves capacity turns trained memory] [--repeats=9] [--model=random:tiny]

1. `capacity`: seconds per decoded token of equal messages in equally full contexts, with room for 1, 2, 4, 8 times as
   many tokens.
2. `turns`: seconds of each turn, a message of each side, in one conversation of messages of equal length.
3. `trained`: seconds of an update, over the number of trained tokens in rows of one length, and over the length of rows
   that are trained whole.
4. `memory`: temporary bytes of the compiled gradients over vocabulary and length of rows, beside those of one float32
   `[B, T, V]`.

Times are of whole calls, the device waited for. Points are measured in turn, A B C A B C, so that what else the machine
does falls on all of them; a first round compiles and is left out. It is for a machine that does nothing else.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, get_args

import jax

from simrl.conversations.chat import ASSISTANT, USER
from simrl.rollouts.state import Dialogue
from simrl.run import memory as run_memory
from simrl.run.config import local_path
from simrl.run.program import run_program
from simrl.run.runtime import enable_compilation_cache, start_backend
from tools.benchmark import inputs, limits, plan, rates
from tools.benchmark.job import Remat
from tools.benchmark.plan import Size
from tools.curves import report, work
from tools.curves.report import Curve, Point
from tools.curves.work import Model

FLOAT32 = 4  # bytes
FLAGS = ('rows', 'message_tokens', 'turns', 'row_length')  # fields of Sizes

T = TypeVar('T')
Key = TypeVar('Key')


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The settings of a measurement."""

    rows: int = 16  # conversations, or rows of an update
    opening_words: int = 8
    message_tokens: int = 32  # of every sampled message
    capacities: tuple[int, ...] = (1, 2, 4, 8)  # times what the conversations of `capacity` need
    turns: int = 10
    row_length: int = 512  # tokens, of `trained` over the number of trained tokens
    shares: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)  # of a row's tokens that are trained
    lengths: tuple[int, ...] = (64, 128, 256, 512)  # tokens, of `trained` over lengths
    vocabularies: tuple[int, ...] = (1024, 4096, 16384, 65536)  # of `memory`
    memory_lengths: tuple[int, ...] = (128, 512)  # tokens


def timed(do: Callable[[], T]) -> tuple[float, T]:
    """Seconds until what `do` returns is there, and what it returns."""
    start = time.perf_counter()
    done = jax.block_until_ready(do())
    return time.perf_counter() - start, done


def in_turn(measures: Mapping[Key, Callable[[], T]], repeats: int) -> dict[Key, list[T]]:
    """Each measure's results in `repeats` rounds through all of them, after one that is left out."""
    rounds = [{key: measure() for key, measure in measures.items()} for _ in range(repeats + 1)]
    return {key: [found[key] for found in rounds[1:]] for key in measures}


def points(found: Mapping[int, Sequence[float]], scale: float = 1.0) -> list[Point]:
    return [Point(x, tuple(scale * value for value in values)) for x, values in found.items()]


def check_memory(model: Model, case: str, size: Size, advice: str) -> None:
    """Refuses sizes before anything of them is allocated; the estimate is that of the benchmark's case."""
    dtype, remat = model.execution.dtype, model.execution.remat
    needed = plan.memory(model.config, case, size, dtype, remat=remat, ours=True)
    what = f'{size.batch} rows of {size.context} tokens in {dtype}'
    limits.check_memory(what, needed, rates.device_bytes() or run_memory.available_bytes(), 1, advice)


def capacity(model: Model, sizes: Sizes, repeats: int) -> list[Curve]:
    scene = work.scene_of(model, sizes.rows, sizes.opening_words, sizes.message_tokens)
    needed = work.needed_capacity(scene, turns=1)
    largest = Size(sizes.rows, max(sizes.capacities) * needed)
    check_memory(model, 'conversations', largest, 'lower --rows or --message-tokens')

    def measure(tokens: int) -> Callable[[], float]:
        def run() -> float:
            dialogue = jax.block_until_ready(work.opened(scene, tokens, turns=1))
            seconds, dialogue = timed(lambda: work.said(scene, dialogue, ASSISTANT))
            work.check_said(scene, dialogue, 1)
            return seconds

        return run

    found = in_turn({times * needed: measure(times * needed) for times in sizes.capacities}, repeats)
    return [
        Curve(
            'capacity',
            'Decoding in larger contexts, equally full',
            'capacity of both contexts, tokens',
            f'ms per decoded token of {sizes.rows} conversations, hearing included',
            {'ms per token': points(found, 1e3 / sizes.message_tokens)},
        )
    ]


def turns(model: Model, sizes: Sizes, repeats: int) -> list[Curve]:
    scene = work.scene_of(model, sizes.rows, sizes.opening_words, sizes.message_tokens)
    slots = sizes.turns + 1  # the opening is the first message of the first of them
    tokens = work.needed_capacity(scene, slots)
    check_memory(model, 'conversations', Size(sizes.rows, tokens), 'lower --rows, --message-tokens or --turns')

    def message(dialogue: Dialogue, role: int) -> tuple[float, Dialogue]:
        return timed(lambda: work.said(scene, dialogue, role))

    def conversation() -> list[float]:
        dialogue = jax.block_until_ready(work.opened(scene, tokens, slots))
        found = []
        for _ in range(sizes.turns):
            reply, dialogue = message(dialogue, ASSISTANT)
            answer, dialogue = message(dialogue, USER)
            found.append(reply + answer)
        work.check_said(scene, dialogue, 2 * sizes.turns)
        return found

    runs = in_turn({'conversation': conversation}, repeats)['conversation']
    found = {number + 1: [run[number] for run in runs] for number in range(sizes.turns)}
    return [
        Curve(
            'turns',
            'Turns of one conversation',
            'turn',
            f'ms of two messages of {sizes.message_tokens} tokens in {sizes.rows} conversations',
            {'ms': points(found, 1e3)},
        )
    ]


def trained(model: Model, sizes: Sizes, repeats: int) -> list[Curve]:
    longest = Size(sizes.rows, max(sizes.row_length, *sizes.lengths))
    check_memory(model, 'update_full', longest, 'lower --rows or --row-length')
    update = work.update_of(model)

    def measure(length: int, tokens: int) -> Callable[[], float]:
        batch = jax.block_until_ready(work.batch_of(model, sizes.rows, length, tokens))
        return lambda: timed(lambda: update(batch))[0]

    counts = sorted({min(max(int(share * sizes.row_length), 1), sizes.row_length - 1) for share in sizes.shares})
    by_count = in_turn({sizes.rows * n: measure(sizes.row_length, n) for n in counts}, repeats)
    by_length = in_turn({n: measure(n, n - 1) for n in sizes.lengths}, repeats)
    what = f'ms of an update by {sizes.rows} rows'
    return [
        Curve(
            'trained_tokens',
            f'Updates by rows of {sizes.row_length} tokens',
            'trained tokens',
            what,
            {'ms': points(by_count, 1e3)},
        ),
        Curve(
            'row_length',
            'Updates by rows that are trained whole',
            'tokens of a row',
            what,
            {'ms': points(by_length, 1e3)},
        ),
    ]


def memory(model: Model, sizes: Sizes, repeats: int) -> list[Curve]:
    """The memory that the compiler plans; it is the same each time, so there are no repeats."""
    lines: dict[str, list[Point]] = {}
    for length in sizes.memory_lengths:
        whole = sizes.rows * length * FLOAT32 / 2**20
        planned = {
            vocabulary: [work.gradient_bytes(model, vocabulary, sizes.rows, length) / 2**20]
            for vocabulary in sizes.vocabularies
        }
        lines[f'temporary, T={length}'] = points(planned)
        lines[f'float32 [B, T, V], T={length}'] = points({n: [whole * n] for n in sizes.vocabularies})
    return [
        Curve('memory', f'Memory of gradients of {sizes.rows} rows', 'vocabulary', 'MiB', lines),
    ]


CURVES: Mapping[str, Callable[[Model, Sizes, int], list[Curve]]] = {
    'capacity': capacity,
    'turns': turns,
    'trained': trained,
    'memory': memory,
}


def draw(output: pathlib.Path, names: Sequence[str], options: argparse.Namespace, sizes: Sizes) -> None:
    """Measures the named curves and writes them."""
    with tempfile.TemporaryDirectory() as scratch:
        model = work.load(options.model, pathlib.Path(scratch) / 'model', options.dtype, options.remat)
    curves: list[Curve] = []
    for name in names:
        for curve in CURVES[name](model, sizes, options.repeats):
            print(f'{curve.title}\n\n{report.table(curve)}\n', flush=True)
            curves.append(curve)
    environment = {
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        **{name: getattr(options, name) for name in ('model', 'dtype', 'remat', 'repeats')},
        **{name: getattr(sizes, name) for name in ('rows', 'message_tokens')},
    }
    report.write(output, environment, curves)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=local_path, required=True, help='a new folder')
    parser.add_argument('--curves', nargs='+', choices=tuple(CURVES), default=tuple(CURVES))
    parser.add_argument('--repeats', type=int, default=9, help='of each point')
    parser.add_argument('--model', default='random:tiny', help='a shape of tools/benchmark, or what load_model takes')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of matrix products')
    parser.add_argument('--remat', choices=get_args(Remat), default='dots', help='of updates')
    for field in FLAGS:
        flag = f'--{field.replace("_", "-")}'
        parser.add_argument(flag, type=int, default=getattr(Sizes(), field), help='see Sizes in the source')
    options = parser.parse_args(arguments)
    for name in ('repeats', 'rows', 'message_tokens', 'turns'):
        if getattr(options, name) < 1:
            parser.error(f'--{name.replace("_", "-")}: expected at least 1, found {getattr(options, name)}')
    if options.row_length < 2:
        parser.error(f'--row-length: expected at least 2, found {options.row_length}')
    return options


def main() -> None:
    options = parse()
    inputs.check_folder(options.output)
    start_backend()
    enable_compilation_cache()
    sizes = Sizes(
        options.rows, message_tokens=options.message_tokens, turns=options.turns, row_length=options.row_length
    )
    draw(options.output, options.curves, options, sizes)


if __name__ == '__main__':
    run_program(main)
