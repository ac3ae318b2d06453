"""A job and its sides in, what each of them took out: one after the other, in turn, once both agree on the numbers.

1. All sides load, which is not timed.
2. They score the same rows: log-probabilities must agree.
3. Each warms up, compilation included, which is told apart. What comes out must agree: losses, norms of gradients,
   numbers of sampled tokens; what simrl sampled must be as probable to the peer as simrl says.
4. Their memory at rest is measured. Then A B A B: a pair of neighbours gives a ratio.
"""

import contextlib
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np

from tools.benchmark import job as job_lib
from tools.benchmark.job import Job
from tools.benchmark.plan import Peer
from tools.benchmark.protocol import Message, Side

ROOT = pathlib.Path(__file__).parents[2]
OURS = 'simrl'
PAUSE = 0.3  # seconds between two runs, in which the threads of the last one come to rest
SCORED_ROWS, SCORED_TOKENS = 2, 48  # of the check before anything is timed
# How far log-probabilities may differ, in nats, and losses and norms relative to their size. In bfloat16 two orders of
# summation differ by a few units of the last of 8 bits.
SCORE_TOLERANCE = {'float32': 5e-3, 'bfloat16': 0.5}
FACT_TOLERANCE = {'float32': 2e-3, 'bfloat16': 5e-2}
WARM_UPS = {'grpo_step': 3}  # runs before what is timed; of a GRPO step the first is only half of one


class Disagreement(SystemExit):
    """Two sides compute different things, so that a ratio of their times means nothing."""


@dataclasses.dataclass(frozen=True)
class SideResult:
    """Time and memory of one side.

    Attributes:
        seconds: of each timed run.
        first_seconds: of a run that samples one token only, `sampling` alone.
        warm_up_seconds: of the runs before, compilation included.
        loaded_bytes: resident, once everything is loaded.
        rest_bytes: resident, after the warm-up: with compiled programs, and what stays allocated between runs.
        peak_bytes: resident, the most in any timed run.
        peak_is: 'since reset', or 'of all time' where the system cannot reset it.
        device_peak_bytes: of an accelerator's memory, of all time.
    """

    name: str
    seconds: list[float]
    first_seconds: list[float]
    warm_up_seconds: float
    loaded_bytes: int
    rest_bytes: int
    peak_bytes: int
    peak_is: str
    device_peak_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def memory(self) -> int:
        """Peak memory of a run over the process at rest, bytes; of an accelerator the peak itself."""
        return self.device_peak_bytes or max(self.peak_bytes - self.rest_bytes, 0)

    def decoding(self) -> 'SideResult | None':
        """Seconds after the first token: the runs less the median of those to it. None where noise leaves nothing."""
        first = statistics.median(self.first_seconds)
        if min(self.seconds) <= first:
            return None
        return dataclasses.replace(self, seconds=[run - first for run in self.seconds], first_seconds=[])


def environment(job: Job) -> dict[str, str]:
    """Of a side's process: where our packages are, and nothing from the network."""
    before = os.environ.get('PYTHONPATH')
    return {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT), *([before] if before else [])]),
        'HF_HUB_OFFLINE': '1',
        'TOKENIZERS_PARALLELISM': 'false',
        'OMP_NUM_THREADS': str(job.threads),
        'JAX_NUM_CPU_DEVICES': str(job.devices),
        # Devices that wait for each other each hold a thread: no program is begun while one is under way.
        **({'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false'} if job.devices > 1 else {}),
        # Both sides share the accelerator, so that neither may take all of its memory beforehand.
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.95',
        'JAX_PLATFORMS': os.environ.get('JAX_PLATFORMS', '') if job.gpu else 'cpu',
    }


def start(name: str, python: pathlib.Path, module: str, job: Job) -> Side:
    """Starts a side: `module` of this package, told the job by a file."""
    job.scratch.mkdir(parents=True, exist_ok=True)
    slug = ''.join(c if c.isalnum() else '-' for c in name)
    path = job.scratch / f'{slug}.json'
    job_lib.write(job, path)
    command = [str(python), '-m', f'tools.benchmark.{module}', str(path)]
    return Side(name, command, environment=environment(job), log=job.scratch / f'{slug}.log')


def measure(
    job: Job, peers: Sequence[Peer], peer_python: pathlib.Path | None, repeats: int, vocab_size: int
) -> list[SideResult]:
    """Runs all sides of a job: simrl's result first, then the peers'.

    Raises:
        Disagreement: the sides do not compute the same.
        SideError: one of them failed.
    """
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(start(OURS, pathlib.Path(sys.executable), 'ours', job))]
        for peer in peers if peer_python is not None else ():
            peer_job = dataclasses.replace(job, logits=peer.logits, remat=job_lib.peers_remat(job.remat))
            assert peer_python is not None
            sides.append(stack.enter_context(start(peer.name, peer_python, f'peers.{peer.script}', peer_job)))
        for side in sides:
            side.load()
        check_scores(job, sides, vocab_size)
        warm_ups = {side.name: [run(side, job) for _ in range(WARM_UPS.get(job.case, 2))] for side in sides}
        check_facts(job, warm_ups)
        if job.case == 'sampling':
            for side in sides:
                run(side, job, first=True)
            check_sampled(job, sides)
        at_rest = {side.name: side.request('rest')['rest_bytes'] for side in sides}
        timed: dict[str, list[Message]] = {side.name: [] for side in sides}
        firsts: dict[str, list[Message]] = {side.name: [] for side in sides}
        for _ in range(repeats):
            for side in sides:
                if job.case == 'sampling':
                    firsts[side.name].append(run(side, job, first=True))
                timed[side.name].append(run(side, job))
        return [
            result_of(side, at_rest[side.name], warm_ups[side.name], timed[side.name], firsts[side.name])
            for side in sides
        ]


def run(side: Side, job: Job, first: bool = False) -> Message:
    """One run, after a pause; with `first` one that samples a single token."""
    time.sleep(PAUSE)
    return side.request('run', new_tokens=1 if first else job.new_tokens)


def result_of(
    side: Side, rest_bytes: int, warm_ups: Sequence[Message], timed: Sequence[Message], firsts: Sequence[Message]
) -> SideResult:
    device_peaks = [reply['device_peak_bytes'] for reply in timed if reply['device_peak_bytes'] is not None]
    return SideResult(
        name=side.name,
        seconds=[reply['seconds'] for reply in timed],
        first_seconds=[reply['seconds'] for reply in firsts],
        warm_up_seconds=sum(reply['seconds'] for reply in warm_ups),
        loaded_bytes=side.loaded['loaded_bytes'],
        rest_bytes=rest_bytes,
        peak_bytes=max(reply['peak_bytes'] for reply in timed),
        peak_is=timed[0]['peak_is'],
        device_peak_bytes=max(device_peaks, default=None),
    )


def check_scores(job: Job, sides: Sequence[Side], vocab_size: int) -> None:
    """All sides score the same random rows."""
    if len(sides) < 2:
        return
    rows = job.scratch / 'rows.npz'
    shape = (SCORED_ROWS, min(SCORED_TOKENS, job.context))
    np.savez(rows, tokens=np.random.default_rng(1).integers(0, vocab_size, shape, dtype=np.int32))
    scores = {side.name: scored(side, job, rows) for side in sides}
    for name, found in scores.items():
        compare(job, f'log-probabilities of the same rows by {name}', found, scores[OURS])


def check_sampled(job: Job, sides: Sequence[Side]) -> None:
    """Checks that the others give the samples of simrl's last run the log-probabilities that it reports."""
    ours, *others = sides
    if not others:
        return
    saved, rows = job.scratch / 'sampled.npz', job.scratch / 'sampled-rows.npz'
    ours.request('save', output=str(saved))
    with np.load(saved) as file, np.load(job.arrays) as arrays:
        sampled, log_prob = file['sampled'], file['log_prob']
        np.savez(rows, tokens=file['tokens'], token_mask=arrays['token_mask'])
    for side in others:
        found = scored(side, job, rows)
        compare(job, f'log-probabilities of sampled tokens by {side.name}', found[sampled], log_prob[sampled])


def scored(side: Side, job: Job, rows: pathlib.Path) -> np.ndarray:
    output = job.scratch / 'scores.npy'
    side.request('score', rows=str(rows), output=str(output))
    scores: np.ndarray = np.load(output)
    return scores


def compare(job: Job, what: str, found: np.ndarray, expected: np.ndarray) -> None:
    tolerance = SCORE_TOLERANCE[job.dtype]
    difference = float(np.max(np.abs(found - expected))) if found.shape == expected.shape else np.inf
    if not difference <= tolerance:
        raise Disagreement(
            f'{job.case}: {what} differ from those of {OURS} by up to {difference:.3g} nats, expected at most '
            f'{tolerance} ({found.size} numbers; the first: {found.ravel()[:4]} and {expected.ravel()[:4]})'
        )


def check_facts(job: Job, runs: Mapping[str, Sequence[Message]]) -> None:
    """Losses, norms of gradients and numbers of sampled tokens of the first runs, which start from the same weights.

    The second loss is that after one update, so that it tells whether updates are the same.
    """
    ours = runs[OURS]
    if job.case in ('sampling', 'conversations', 'grpo_step'):
        expected = job.batch * job.new_tokens * (2 * job.turns - 1)
        for name, replies in runs.items():
            for reply in replies:
                if reply['sampled'] != expected:
                    raise Disagreement(
                        f'{job.case}: expected every run to sample {expected} tokens, found that {name} sampled '
                        f'{reply["sampled"]}'
                    )
        return
    tolerance = FACT_TOLERANCE[job.dtype]
    for name, replies in runs.items():
        for i, (reply, own) in enumerate(zip(replies, ours, strict=True)):
            for fact in ('loss', 'grad_norm'):
                size = max(abs(own[fact]), abs(reply[fact]), 1.0 if fact == 'loss' else 0.0)
                if not abs(reply[fact] - own[fact]) <= tolerance * size:
                    raise Disagreement(
                        f'{job.case}: {fact} of update {i} is {reply[fact]:.6g} by {name} and {own[fact]:.6g} by '
                        f'{OURS}, expected a difference of at most {tolerance} of its size'
                    )
