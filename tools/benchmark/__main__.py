"""Speed of simrl beside torch, transformers and TRL on the same weights and tokens, and beside the machine's limit.

    python -m tools.benchmark --output=DIR [--model=SmolLM2-135M-Instruct.gguf] [--cases sampling update_full ...]
    python -m tools.benchmark --output=DIR --gpu
    python -m tools.benchmark --output=DIR --cases sampling --sweep batch context
    python -m tools.benchmark --output=DIR --model=random:tiny --peers=none

Cases: `sampling` (replies to openings), `update_full` and `update_ragged` (a gradient step on full rows, and on rows of
conversations of which one role is learned), `grpo_step` (a whole step of single-turn GRPO), `conversations` (five turns
of two models), `sft` (fine-tuning of a simulator). Every side of a comparison is a process that loads once and runs
when asked: A B A B, on the same cores. Before anything is timed the sides must agree on log-probabilities, losses,
gradients and numbers of tokens. Nothing else should run on the machine: torch suffers most where its threads wait.
Ragged rows are one padded batch for torch; simrl sorts them into microbatches by length, as its own trainings can. For
gradients simrl recomputes all but products with weights and attention by blocks, and its peers, which have no such way,
nothing (see --remat).

On a CPU --devices=2 splits simrl's rows over two devices of XLA, which share the threads: products of many small
matrices, as in attention to a cache, run on one thread of each device.

The peers live in a virtual environment that the tool makes once. --gpu measures the shapes of Qwen2.5-1.5B and
SmolLM2-135M with random bfloat16 weights. DIR gets benchmark.json, benchmark.md and pictures.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax

from simrl.conversations.chat import Chat
from simrl.models.abstract import ITEM_BYTES
from simrl.models.transformer import TransformerConfig
from simrl.run import memory
from simrl.run.config import local_path
from simrl.run.program import run_program
from simrl.run.workers import cpus
from tools.benchmark import environment, inputs, limits, measure, models, plan, report
from tools.benchmark.job import CASES, Attention, Job, Remat, peers_remat
from tools.benchmark.plan import PEERS, Size
from tools.benchmark.protocol import SideError

CPU_MODELS = ('random:smollm2',)
AFTER_FIRST = 'sampling, after the first token'  # a part of a case, with a row of its own
BUSY = 0.5  # of a machine's load, from which on times are not to be trusted
GPU_MODELS = ('random:qwen2.5-1.5b', 'random:smollm2')


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m tools.benchmark', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--output', required=True, type=local_path, help='a new folder')
    parser.add_argument(
        '--model',
        nargs='+',
        help='a .gguf file, a Hugging Face folder or hub name, or random:tiny, random:smollm2, random:qwen2.5-1.5b',
    )
    parser.add_argument('--cases', nargs='+', default=list(CASES), help=f'some of {", ".join(CASES)}; all by default')
    parser.add_argument('--batch', nargs='+', type=int, help='rows; each case has its own by default')
    parser.add_argument('--context', nargs='+', type=int, help='tokens of the longest row, all of it included')
    parser.add_argument('--turns', nargs='+', type=int, help='of conversations')
    parser.add_argument('--new-tokens', type=int, help='sampled for a reply; half of the context by default')
    parser.add_argument('--samples', type=int, default=4, help='replies to each opening of grpo_step')
    parser.add_argument('--sweep', nargs='+', default=[], choices=plan.SWEPT, help='sizes to vary around the first one')
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each side')
    parser.add_argument('--dtype', choices=sorted(ITEM_BYTES), help='float32, or with --gpu bfloat16')
    parser.add_argument('--threads', type=int, default=len(cpus()), help='of each side, on that many cores')
    parser.add_argument('--devices', type=int, default=1, help='on a CPU, what simrl splits its rows over')
    parser.add_argument(
        '--remat',
        choices=get_args(Remat),
        help='what gradients recompute: dots by default (all but products with weights and attention by blocks), which '
        'peers do not have and recompute nothing; full with --gpu',
    )
    parser.add_argument('--attention', choices=get_args(Attention), default='auto', help='of simrl in training')
    parser.add_argument('--gpu', action='store_true', help='on a GPU, in bfloat16')
    parser.add_argument('--peers', choices=('torch', 'none'), default='torch', help='none: simrl alone')
    parser.add_argument('--peer-env', type=local_path, help="the peers' virtual environment; made where it is missing")
    options = parser.parse_args(arguments)
    for name in ('repeats', 'threads', 'devices', 'new_tokens', 'samples', 'batch', 'context', 'turns'):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if value < 1:
                parser.error(f'--{name.replace("_", "-")}: expected at least 1, found {value}')
    if options.threads > len(cpus()):
        parser.error(f'--threads: expected at most the {len(cpus())} cores there are, found {options.threads}')
    most_devices = 1 if options.gpu else options.threads
    if options.devices > most_devices:
        parser.error(f'--devices: expected at most one a thread, and 1 with --gpu, found {options.devices}')
    options.model = options.model or (GPU_MODELS if options.gpu else CPU_MODELS)
    options.dtype = options.dtype or ('bfloat16' if options.gpu else 'float32')
    options.remat = options.remat or ('full' if options.gpu else 'dots')
    try:
        options.cases = plan.check_cases(options.cases)
        for case in options.cases:
            plan.check_devices(options.devices, case, sizes(options, case))
        for source in options.model:
            models.shape_of(source)
    except ValueError as error:
        parser.error(str(error))
    return options


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measurements before the cases.

    Attributes:
        rates: the better of what JAX and torch reach.
        device_bytes: of an accelerator; None on a CPU.
        facts: for the report.
    """

    rates: limits.Rates
    device_bytes: int | None
    facts: dict[str, Any]


def machine_of(options: argparse.Namespace, peer_python: pathlib.Path | None, work: pathlib.Path) -> Machine:
    """Measures the machine by each side's own means, one after the other."""
    job = job_of(options, 'rates', Size(1, 1), 1, 1, work, work)
    load = os.getloadavg()[0]
    if load > BUSY:
        print(
            f'the machine is busy (load {load:.1f}): expected nothing beside this; the times will mislead', flush=True
        )
    scripts = [(measure.OURS, pathlib.Path(sys.executable), 'ours')]
    scripts += [('torch', peer_python, f'peers.{plan.TORCH}')] if peer_python is not None else []
    found = {}
    for name, python, module in scripts:
        with measure.start(name, python, module, job) as side:
            found[name] = side.load()
        if options.gpu and found[measure.OURS]['device_bytes'] is None:
            raise SystemExit(f'--gpu: expected JAX to find a GPU, found {found[measure.OURS]["device"]}')
    rates = limits.Rates(
        flops=max(f['flops'] for f in found.values()), bandwidth=max(f['bandwidth'] for f in found.values())
    )
    facts = {
        'device': found[measure.OURS]['device'],
        'cores': len(cpus()),
        'load before the start': round(load, 1),
        'threads of each side': options.threads,
        "simrl's devices": options.devices if options.gpu else found[measure.OURS]['devices'],
        'system': platform.platform(terse=True),
        'python': platform.python_version(),
        'versions': ', '.join(f['version'] for f in found.values()),
        'matrix products, GFLOP/s': {name: round(f['flops'] / 1e9, 1) for name, f in found.items()},
        'memory, GB/s': {name: round(f['bandwidth'] / 1e9, 1) for name, f in found.items()},
        'recomputed in gradients': {'simrl': options.remat, 'peers': peers_remat(options.remat)},
        'compilation cache': os.environ.get('JAX_COMPILATION_CACHE_DIR') is not None,
    }
    return Machine(rates, found[measure.OURS]['device_bytes'], facts)


def job_of(
    options: argparse.Namespace,
    case: str,
    size: Size,
    new_tokens: int,
    samples: int,
    model: pathlib.Path,
    work: pathlib.Path,
) -> Job:
    name = f'{case}-{size.batch}-{size.context}-{size.turns}'
    return Job(
        case=case,
        model=model,
        dtype=options.dtype,
        batch=size.batch,
        context=size.context,
        turns=size.turns,
        new_tokens=new_tokens,
        samples=samples,
        remat=options.remat,
        attention=options.attention,
        logits='all',
        gpu=options.gpu,
        threads=options.threads,
        devices=options.devices,
        inputs=work / 'inputs' / name,
        scratch=work / name,
    )


def sizes(options: argparse.Namespace, case: str) -> list[Size]:
    defaults = (plan.GPU_SIZES if options.gpu else plan.CPU_SIZES)[case]
    return plan.sizes_of(case, defaults, options.batch, options.context, options.turns, options.sweep)


def check_memory(options: argparse.Namespace, config: TransformerConfig, available: int | None) -> None:
    """Refuses before anything is allocated, whichever case it is that is too large."""
    for case in options.cases:
        peers = PEERS[case] if options.peers != 'none' else ()
        for size in sizes(options, case):
            own, peer = (
                plan.memory(config, case, size, options.dtype, remat=options.remat, ours=ours, devices=options.devices)
                for ours in (True, False)
            )
            what = f'{case} of {size.batch} rows of {size.context} tokens in {options.dtype}'
            needed = own + len(peers) * peer
            advice = 'lower --batch or --context, or measure simrl alone with --peers=none'
            limits.check_memory(what, needed, available, 1 + len(peers), advice)


def new_tokens_of(options: argparse.Namespace, case: str, size: Size, chat: Chat) -> int:
    if case == 'conversations':
        return inputs.message_tokens(chat, size.context, size.turns)
    chosen: int = options.new_tokens or max(size.context // 2, 1)
    return chosen


def run_case(
    options: argparse.Namespace,
    job: Job,
    source: str,
    config: TransformerConfig,
    chat: Chat,
    machine: Machine,
    peer_python: pathlib.Path | None,
) -> list[report.Row]:
    """All rows of a job: one for each peer, and for sampling one more each for what follows the first token."""
    counts = inputs.write(job, chat, config.vocab_size)
    weights = limits.weights_of(config)
    ours, *others = measure.measure(job, PEERS[job.case], peer_python, options.repeats, config.vocab_size)
    common = {
        'model': source.removeprefix(models.RANDOM) if source.startswith(models.RANDOM) else pathlib.Path(source).name,
        **{name: getattr(job, name) for name in ('dtype', 'batch', 'context', 'turns', 'new_tokens')},
    }
    limit = limits.limit_of(plan.phases(job, counts, weights), machine.rates)
    tokens = plan.processed_tokens(job, counts)
    peers: Sequence[measure.SideResult | None] = others or [None]
    rows = [report.Row(case=job.case, tokens=tokens, limit=limit, ours=ours, peer=peer, **common) for peer in peers]
    if job.case == 'sampling' and job.new_tokens > 1:
        later = limits.limit_of(plan.decoding_phases(job, counts, weights), machine.rates)
        for row in list(rows):
            own, peer = row.ours.decoding(), None if row.peer is None else row.peer.decoding()
            if own is None or (row.peer is not None and peer is None):
                print('sampling: the first token takes too long to tell the others apart', flush=True)
                continue
            part = dataclasses.replace(row, case=AFTER_FIRST, limit=later, ours=own, peer=peer, memory=False)
            rows.append(dataclasses.replace(part, tokens=job.batch * (job.new_tokens - 1)))
    return rows


def run_model(
    options: argparse.Namespace, source: str, work: pathlib.Path, machine: Machine, peer_python: pathlib.Path | None
) -> Iterator[list[report.Row]]:
    """The rows of each case and size, as they come."""
    available = machine.device_bytes or memory.available_bytes()
    shape = models.shape_of(source)
    if shape is not None:
        check_memory(options, shape, available)
    folder = work / 'model'
    config, chat = models.prepare(source, folder, options.dtype)
    check_memory(options, config, available)
    for case in options.cases:
        for size in sizes(options, case):
            new_tokens = new_tokens_of(options, case, size, chat)
            samples = plan.samples_of(case, size.batch, options.samples)
            job = job_of(options, case, size, new_tokens, samples, folder, work)
            yield run_case(options, job, source, config, chat, machine, peer_python)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    inputs.check_folder(options.output)
    jax.config.update('jax_platforms', 'cpu')  # this process only writes files; an accelerator is the sides'
    if not options.gpu:  # of an accelerator the size is not known yet
        for source in options.model:
            if (shape := models.shape_of(source)) is not None:
                check_memory(options, shape, memory.available_bytes())
    peer_python = None
    if options.peers != 'none':
        peer_python = environment.make(options.peer_env or environment.default_folder())
    rows: list[report.Row] = []
    with tempfile.TemporaryDirectory(prefix='simrl-benchmark-') as folder:
        work = pathlib.Path(folder)
        try:
            machine = machine_of(options, peer_python, work)
            for i, source in enumerate(options.model):
                for found in run_model(options, source, work / f'model-{i}', machine, peer_python):
                    rows += found
                    print('\n'.join(map(report.summary, found)), flush=True)
                    report.write(options.output, machine.facts, rows)  # what there is, should a later case fail
        except (SideError, ValueError, FileNotFoundError) as error:
            raise SystemExit(f'{error}') from error
    print(f'\n{report.table(rows)}\n{options.output}: written')


if __name__ == '__main__':
    run_program(main)
