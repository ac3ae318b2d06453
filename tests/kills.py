"""Kills a command at random moments, resumes it after each, and compares the run with an unbroken one.

    python -m tests.kills --workdir DIR --kills 10 --seed 0 -- COMMAND ... DIR

The command must resume in `workdir` when it is started again. A kill is SIGKILL to its process group. Three kills of
five come at a random time; the others come a few milliseconds after the start of a checkpoint, since saves are short.
Step and phase of each are printed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from simrl.run.metrics import TENSORBOARD_FOLDER, UNREPEATED

POLL_SECONDS = 0.001
START_SECONDS = 3.0  # roughly, from the start of a process to its first step


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        step: the last step of the newest metrics.jsonl; -1 if there is none.
        phase: 'start-up' (the process had logged no step), 'save' (a checkpoint was half-written), or 'run'.
        seconds: since the start of the process.
    """

    step: int
    phase: str
    seconds: float


def run_with_kills(
    command: Sequence[str],
    workdir: pathlib.Path,
    num_kills: int,
    seed: int,
    *,
    lines: int,
    span: float,
    timeout: float = 3600.0,
) -> list[Kill]:
    """Runs and kills `command` `num_kills` times, then runs it to its end.

    Args:
        command: program and arguments.
        workdir: its run directory; contains no other runs.
        lines: a process logs 1 to `lines` steps before it is killed, so that slow machines make progress, too; at most
            the lines of a whole run divided by twice the number of kills.
        span: seconds; the kill comes at most this long after those lines. About the time between two lines. (One kill
            in five comes within `START_SECONDS` of the start instead.)
        timeout: seconds for each process.

    Raises:
        RuntimeError: the command failed, took too long, or ended before its last kill.
    """
    rng = random.Random(seed)
    kills: list[Kill] = []
    while len(kills) < num_kills:
        aim = ('start', 'run', 'save', 'save', 'run')[len(kills) % 5]
        kill = _killed_once(command, workdir, aim, rng, lines, span, timeout)
        if kill is None:
            raise RuntimeError(f'the command ended after {len(kills)} of {num_kills} kills: give it more to do')
        kills.append(kill)
        print(f'kill {len(kills)}: step {kill.step}, phase {kill.phase}, after {kill.seconds:.2f} s', flush=True)
    done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'the last run of the command failed with {done.returncode}:\n{done.stdout}\n{done.stderr}')
    return kills


def _killed_once(
    command: Sequence[str],
    workdir: pathlib.Path,
    aim: str,
    rng: random.Random,
    lines: int,
    span: float,
    timeout: float,
) -> Kill | None:
    sizes = _sizes(workdir)
    log = workdir.parent / f'{workdir.name}.log'
    with open(log, 'ab') as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    started = time.monotonic()
    wait, wanted_lines = rng.uniform(0, span), rng.randint(1, lines)
    pause = rng.uniform(0, 0.01)
    deadline = started + rng.uniform(0, START_SECONDS) if aim == 'start' else None
    logged = 0
    while process.poll() is None:
        now = time.monotonic()
        earlier, sizes = sizes, _sizes(workdir)
        # Only growth counts: a resumed process first truncates the files. Step 0 is logged before any step.
        grown = any(size > earlier.get(path, 0) for path, size in sizes.items())
        logged += grown and _last_step(workdir) > 0
        if deadline is None and logged >= wanted_lines:
            deadline = now + wait
        if deadline is not None and now >= deadline and (aim != 'save' or _saving(workdir)):
            break
        if now - started > timeout:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f'the command took longer than {timeout} s; see {log}')
        time.sleep(POLL_SECONDS)
    if aim == 'save':
        time.sleep(pause)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    if code == 0:
        return None
    if code != -signal.SIGKILL:
        raise RuntimeError(f'the command failed with {code} before it was killed; see {log}')
    phase = 'save' if _saving(workdir) else 'run' if logged else 'start-up'
    return Kill(_last_step(workdir), phase, time.monotonic() - started)


def _saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is half-written. (os.walk, unlike glob, ignores folders that vanish.)"""
    return any('.orbax-checkpoint-tmp' in name for _, names, _ in _walk(workdir) for name in names)


def _sizes(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
    paths = [pathlib.Path(folder) / 'metrics.jsonl' for folder, _, names in _walk(workdir) if 'metrics.jsonl' in names]
    return {path: path.stat().st_size for path in paths if path.exists()}


def _walk(workdir: pathlib.Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, folders, files in os.walk(workdir):
        yield folder, folders, files
        if pathlib.Path(folder).name == 'checkpoints':
            folders.clear()  # skip checkpoints' contents


def _last_step(workdir: pathlib.Path) -> int:
    files = sorted(_sizes(workdir), key=lambda path: path.stat().st_mtime)
    if not files:
        return -1
    lines = [line for line in files[-1].read_text().split('\n')[:-1] if line]
    return json.loads(lines[-1])['step'] if lines else -1


def assert_same_run(unbroken: pathlib.Path, broken: pathlib.Path) -> None:
    """Asserts that two run directories have equal values in metrics.jsonl, TensorBoard and conversations.

    Exempt are metrics that depend on the clock or on a cache (`UNREPEATED`), and the times of TensorBoard's events.
    """
    names = [sorted(str(p.relative_to(folder)) for p in _run_files(folder)) for folder in (unbroken, broken)]
    assert names[0], f'{unbroken}: nothing to compare'
    assert names[0] == names[1]
    for name in names[0]:
        first, second = (_contents(folder / name) for folder in (unbroken, broken))
        assert len(first) == len(second), f'{name}: {len(first)} entries and {len(second)}'
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert a == b, f'{name}, entry {i}: {a} and {b}'


def _run_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files of lines, and folders of TensorBoard files: these have one for each process."""
    return [*folder.glob('**/*.jsonl'), *folder.glob(f'**/{TENSORBOARD_FOLDER}')]


def _contents(path: pathlib.Path) -> list[Any]:
    if path.name == TENSORBOARD_FOLDER:
        return events(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if path.name == 'metrics.jsonl':
        steps = [row['step'] for row in rows]
        assert steps == sorted(set(steps)), f'{path}: steps are repeated or out of order: {steps}'
    return [{key: value for key, value in row.items() if not key.startswith(UNREPEATED)} for row in rows]


def events(folder: pathlib.Path) -> list[tuple[int, str, Any]]:
    """(step, tag, value) as TensorBoard reads a folder; without `UNREPEATED` and the times of the hyperparameters."""
    found = []
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag.startswith('_hparams_'):
                    found.append((event.step, value.tag, None))
                elif not value.tag.startswith(UNREPEATED):
                    found.append((event.step, value.tag, tensor_util.make_ndarray(value.tensor).tolist()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--unbroken', type=pathlib.Path, help='a finished run of the same command, to compare with')
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--lines', type=int, default=3)
    parser.add_argument('--span', type=float, default=5.0, help='seconds')
    parser.add_argument('command', nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ['--'] else args.command
    run_with_kills(command, args.workdir, args.kills, args.seed, lines=args.lines, span=args.span)
    if args.unbroken is not None:
        assert_same_run(args.unbroken, args.workdir)
        print('equal to the unbroken run')


if __name__ == '__main__':
    main()
