"""Long checks of what must hold: long tests, README's commands, and `kill -9` at random moments.

    python -m tools.soak tests
    python -m tools.soak commands --model=SmolLM2-135M-Instruct.gguf --workdir=DIR
    python -m tools.soak stages --model=SmolLM2-135M-Instruct.gguf --data=FOLDER --workdir=DIR [--kills=10] [--seed=0]
    python -m tools.soak faults --model=SmolLM2-135M-Instruct.gguf --data=FOLDER --workdir=DIR [--steps=200]
    python -m tools.soak quickstart --workdir=DIR [--kills=20] [--seed=0]
    python -m tools.soak study --workdir=DIR [--kills=50] [--participants=40] [--store=URL]

`tests` runs the tests that `python -m pytest` leaves out: those marked `long`. `commands` runs those of README that
`.ci/run` leaves out, in small forms.

`stages` runs fine-tuning of the user simulator and RL of an assistant once without and once with kills (a small random
model, the given tokenizer and conversations), prints step and phase of each kill, and compares every value and step of
metrics.jsonl, the conversations and TensorBoard; quantities of the clock (`time/`) and of caches
(`endpoint/`) are exempt.

`faults` does the same with RL against a simulator and a judge behind a server that fails at first in 30% of requests:
the run is compared with one of the same server on a good day.

`quickstart` does the same with quickstart.py:smoke, whose workers die with it, and compares the bytes of
results/*.json except timings.json. A third of the kills each is aimed at a process's start-up, at stages, and at the
finish, where results are written; the phase of each is printed. After each kill, the results that exist must be whole,
and the same command resumes.

`study` kills the server of a user study while scripted participants are in it, and starts it again: every answer that a
participant saw confirmed must be in the store once, nothing else, and every participant must come to their end.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from simrl.evaluation.results.files import RESULTS_FOLDER
from simrl.run.config import local_path
from simrl.run.program import run_child, run_program
from simrl.run.stage_files import LOCK_FILE, is_done
from tests.experiments.with_endpoints import ARM, answers, transient
from tests.kills import assert_same_run, run_with_kills
from tests.remote.server import ScriptedServer
from tests.study.kills import run_with_kills as study_with_kills

STAGES = ('sft/fine_tuned', 'rl/fine_tuned/seed-0')  # whose metrics are compared
TIMINGS = 'timings.json'
PHASES = ('start-up', 'stages', 'finish')  # of a process, in order
AIMS = ('stages', 'finish', 'start-up', 'finish', 'stages', 'start-up')  # of kills, over and over
POLL_SECONDS = 0.01


def check_tests(options: argparse.Namespace) -> None:
    run_child([sys.executable, '-m', 'pytest', '-m', 'long'])


def check_commands(options: argparse.Namespace) -> None:
    controls, evaluation = options.workdir / 'controls', '--config.evaluation'
    quickstart, concierge, smollm2 = (f'--config=configs/{x}.py:smoke' for x in ('quickstart', 'concierge', 'smollm2'))
    sample = [f'--config.model.source={options.model}', '--config.data.folder=tests/data/sample']
    sizes = [f'{evaluation}.people=4', f'{evaluation}.matrix=4', f'{evaluation}.batch_size=4']
    few = ['--batch=4', '--context=96', '--repeats=2']
    for module, *words in (
        ['simrl.main', concierge, f'--workdir={options.workdir}/concierge'],
        ['tools.controls', 'dial', quickstart, f'--workdir={controls}', '--dials', '0', '1', '--seeds', *'0123'],
        ['tools.controls', 'twice', f'--run={controls}/dial-1'],
        ['simrl.main', smollm2, f'--workdir={options.workdir}/sample', *sample, *sizes, '--only=sft/fine_tuned'],
        ['tools.benchmark', f'--output={options.workdir}/benchmark', '--model=random:tiny', '--peers=none', *few],
        ['tools.curves', f'--output={options.workdir}/curves', '--repeats=1', '--rows=2', '--message-tokens=4'],
    ):
        print('python -m', module, *words, flush=True)
        run_child([sys.executable, '-m', module, *words])


def command(options: argparse.Namespace, workdir: pathlib.Path) -> list[str]:
    """The experiment on a tiny model, with a checkpoint at every step, up to the RL stage of the fine-tuned arm."""
    return [
        *(sys.executable, '-m', 'simrl.main', '--config=configs/smollm2.py:smoke', f'--workdir={workdir}'),
        *(f'--config.model.source={options.model}', f'--config.data.folder={options.data}', f'--only={STAGES[-1]}'),
        *('--config.compute.loop.checkpoint_every=1', '--config.compute.loop.evaluate_every=20'),
        *('--config.user_sft.sft.steps=60', '--config.rl.steps=60', '--config.workers=1'),
    ]


def check_stages(options: argparse.Namespace) -> None:
    unbroken, broken = options.workdir / 'unbroken', options.workdir / 'killed'
    started = time.monotonic()
    run_child(command(options, unbroken))
    print(f'unbroken: {time.monotonic() - started:.0f} s', flush=True)
    run_with_kills(command(options, broken), broken, options.kills, options.seed, lines=3, span=2.0)
    for stage in STAGES:
        assert_same_run(unbroken / stage, broken / stage)
        print(f'{stage}: {options.kills} kills, every value and step equal', flush=True)


def check_faults(options: argparse.Namespace) -> None:
    unbroken, broken, stage = options.workdir / 'unbroken', options.workdir / 'killed', f'rl/{ARM}/seed-0'

    def words(workdir: pathlib.Path) -> list[str]:
        return [
            *(sys.executable, '-m', 'simrl.main', f'--config=tests/experiments/with_endpoints.py:{server.url}'),
            *(f'--workdir={workdir}', f'--only={stage}', f'--config.rl.steps={options.steps}'),
            *(f'--config.model.source={options.model}', f'--config.data.folder={options.data}'),
        ]

    with ScriptedServer(answers) as server:
        run_child(words(unbroken))
        asked, server.script = len(server.requests), transient
        lines = max(1, options.steps // (2 * max(1, options.kills)))
        run_with_kills(words(broken), broken, options.kills, options.seed, lines=lines, span=2.0)
        again = len(server.requests) - asked
    assert_same_run(unbroken / stage, broken / stage)
    print(
        f'{stage}: {options.steps} steps, {options.kills} kills, {asked} requests and {again} with faults: equal',
        flush=True,
    )


@dataclasses.dataclass(frozen=True)
class Seen:
    """Phases of a process, by the seconds from its start at which each began, and its end."""

    began: dict[str, float]
    seconds: float  # that it lived
    killed: bool


def watch(workdir: pathlib.Path, log: pathlib.Path, aim: str | None = None, wait: float = 0.0) -> Seen:
    """Runs the quickstart in `workdir`; kills it `wait` seconds after the phase `aim` began, if it lives so long.

    Raises:
        SystemExit: it failed; what it printed is in `log`.
    """
    command = [sys.executable, '-m', 'simrl.main', '--config=configs/quickstart.py:smoke', f'--workdir={workdir}']
    with open(log, 'w', encoding='utf-8') as output:
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
    start, began, killed = time.monotonic(), {PHASES[0]: 0.0}, False
    try:
        while process.poll() is None:
            now = time.monotonic() - start
            if any(line.startswith('== ') for line in log.read_text(encoding='utf-8').splitlines()):
                began.setdefault('stages', now)
            lock = workdir / RESULTS_FOLDER / LOCK_FILE
            if lock.exists() and lock.read_text(encoding='utf-8').startswith(f'process {process.pid} '):
                began.setdefault('finish', now)
            if aim in began and now >= began[aim] + wait:
                os.killpg(process.pid, signal.SIGKILL)
                killed = process.wait() == -signal.SIGKILL
                break
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:  # at Ctrl-C, which its own session does not get
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode and not killed:
        raise SystemExit(f'quickstart: expected it to go on, found exit code {process.returncode}; see {log}')
    return Seen(began, time.monotonic() - start, killed)


def check_quickstart(options: argparse.Namespace) -> None:
    options.workdir.mkdir(parents=True)
    unbroken, broken = options.unbroken or options.workdir / 'unbroken', options.workdir / 'killed'
    log = options.workdir / 'output.log'
    if options.unbroken is None:
        watch(unbroken, log)
    again = watch(unbroken, log)  # what a run does that is done: it starts and finishes
    timings = json.loads((unbroken / RESULTS_FOLDER / TIMINGS).read_text(encoding='utf-8'))['stages']
    seconds = sum(timings.values()) / 2
    longest = {  # waits: most come so late that processes get to work, and so early that a run sees several
        'start-up': again.began['stages'],
        'stages': seconds / 2,
        'finish': 0.9 * (again.seconds - again.began['finish']),
    }
    print(
        f'quickstart: start-up takes {longest["start-up"]:.1f} s, the stages {2 * seconds:.0f} s, the finish '
        f'{again.seconds - again.began["finish"]:.1f} s',
        flush=True,
    )
    moments = random.Random(options.seed)
    kills: collections.Counter[str] = collections.Counter()
    while kills.total() < options.kills:
        aim = AIMS[kills.total() % len(AIMS)]
        seen = watch(broken, log, aim, moments.uniform(0.0, longest[aim]))
        if seen.killed:
            phase = max(seen.began, key=PHASES.index)
            kills[phase] += 1
            done = sum(is_done(broken / name) for name in timings)
            print(
                f'kill {kills.total()}: in {phase}, after {seen.seconds:.1f} s, {done} of {len(timings)} stages done',
                flush=True,
            )
            for path in (broken / RESULTS_FOLDER).glob('*.json'):
                json.loads(path.read_text(encoding='utf-8'))
            continue
        compare_results(unbroken, broken)
        longest[aim] /= 2  # this machine is faster now than it was for the unbroken run
        print(f'quickstart: ended after {kills.total()} kills, results equal; once more from nothing', flush=True)
        broken = broken.with_name(f'{broken.name}-on')
    watch(broken, log)
    compare_results(unbroken, broken)
    counts = ', '.join(f'{kills[phase]} in {phase}' for phase in PHASES)
    print(f'quickstart: {kills.total()} kills ({counts}), the bytes of all results equal', flush=True)


def compare_results(first: pathlib.Path, second: pathlib.Path) -> None:
    """Raises SystemExit unless two run directories hold the same results, timings aside."""
    names = sorted(path.name for path in (first / RESULTS_FOLDER).glob('*.json'))
    found = sorted(path.name for path in (second / RESULTS_FOLDER).glob('*.json'))
    if names != found or TIMINGS not in names or len(names) < 2:
        raise SystemExit(f'{second}: expected the results {names}, found {found}')
    for name in names:
        if (
            name != TIMINGS
            and (first / RESULTS_FOLDER / name).read_bytes() != (second / RESULTS_FOLDER / name).read_bytes()
        ):
            raise SystemExit(f'{second / RESULTS_FOLDER / name}: expected the bytes of the unbroken run, found others')


def check_study(options: argparse.Namespace) -> None:
    found = study_with_kills(options.workdir, options.kills, options.participants, options.seed, options.store)
    answers = collections.Counter(action.seen for walk in found.walks for action in walk.actions if action.fields)
    ends = sum(bool(walk.code) for walk in found.walks)
    print(
        f'study: {found.kills} kills, {len(found.walks)} participants, {ends} with a completion code, {found.events} '
        f'events; answers: {dict(answers)}; differences: {len(found.wrong)}',
        flush=True,
    )
    if found.wrong:
        raise SystemExit('\n'.join(found.wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = parser.add_subparsers(dest='check', required=True)
    checks.add_parser('tests', help='tests that are marked long')
    commands = checks.add_parser('commands', help="README's commands in small forms")
    commands.add_argument('--model', required=True, help='as --config.model.source')
    stages = checks.add_parser('stages', help='fine-tuning and RL')
    faults = checks.add_parser('faults', help='RL against endpoints that fail')
    faults.add_argument('--steps', type=int, default=200)
    for check in (stages, faults):
        check.add_argument('--model', required=True, help='as --config.model.source')
        check.add_argument('--data', required=True, help='as --config.data.folder')
    quickstart = checks.add_parser('quickstart', help='the whole experiment with a known answer')
    quickstart.add_argument('--unbroken', type=local_path, help='a finished run to compare with; None makes one')
    study = checks.add_parser('study', help='the server of a user study, with participants in it')
    study.add_argument('--participants', type=int, default=40, help='at once')
    study.add_argument('--store', default='', help='URL of a store; default: SQLite in the folder')
    for check in (commands, stages, faults, quickstart, study):
        check.add_argument('--workdir', required=True, type=local_path, help='a new folder')
    for check, kills in ((stages, 10), (faults, 10), (quickstart, 20), (study, 50)):
        check.add_argument('--kills', type=int, default=kills, help='of each job')
        check.add_argument('--seed', type=int, default=0, help='of the moments')
    options = parser.parse_args()
    if 'workdir' in options and options.workdir.exists():
        raise SystemExit(f'{options.workdir}: expected no such folder yet, found one')
    of_check = {
        'commands': check_commands,
        'faults': check_faults,
        'quickstart': check_quickstart,
        'stages': check_stages,
        'study': check_study,
        'tests': check_tests,
    }
    of_check[options.check](options)


if __name__ == '__main__':
    run_program(main)
