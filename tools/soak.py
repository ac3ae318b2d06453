"""Long checks of what must hold: `kill -9` at random moments, each followed by the same command.

    python -m tools.soak stages --model=SmolLM2-135M-Instruct.gguf --data=FOLDER --workdir=DIR [--kills=10] [--seed=0]
    python -m tools.soak quickstart --workdir=DIR [--kills=20] [--seed=0]

`stages` runs fine-tuning of the user simulator and RL of an assistant once without and once with kills (a small random
model, the given tokenizer and conversations), prints step and phase of each kill, and compares every value and step of
metrics.jsonl, the conversations and TensorBoard; quantities of the clock (`time/`) are exempt.

`quickstart` does the same with quickstart.py:smoke, whose lanes die with it, and compares the bytes of results/*.json;
timings.json is exempt.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from simrl.evaluation.results import RESULTS_FOLDER
from tests.kills import assert_same_run, run_with_kills

STEPS = {'sft_user': ('--config.user_sft.sft.steps=60',), 'rl': ('--config.rl.steps=60',)}
TIMINGS = 'timings.json'
START_SECONDS = 5.0  # about what a process takes to its first stage


def commands(name: str, options: argparse.Namespace, workdir: pathlib.Path) -> list[str]:
    """The job `name` of configs/, small, in `workdir`."""
    common = [f'--config.model.source={options.model}', f'--config.data.folder={options.data}']
    every = ['--config.computing.loop.checkpoint_every=1', *STEPS.get(name, ())]
    if name == 'rl':
        every.append(f'--config.reward_stage={options.workdir}/reward_model/reward_model/train')
    if name == 'sft_user':
        every.append('--config.computing.loop.evaluate_every=20')
    config = f'--config=configs/{name}.py:smoke'
    return [sys.executable, '-m', 'simrl.main', config, f'--workdir={workdir}', *common, *every]


def check_stages(options: argparse.Namespace) -> None:
    subprocess.run(commands('reward_model', options, options.workdir / 'reward_model'), check=True)
    for name in ('sft_user', 'rl'):
        unbroken, broken = options.workdir / f'{name}-unbroken', options.workdir / f'{name}-killed'
        started = time.monotonic()
        subprocess.run(commands(name, options, unbroken), check=True)
        seconds = time.monotonic() - started
        print(f'{name}: unbroken {seconds:.0f} s', flush=True)
        run_with_kills(commands(name, options, broken), broken, options.kills, options.seed, lines=3, span=2.0)
        assert_same_run(unbroken, broken)
        print(f'{name}: {options.kills} kills, every value and step equal', flush=True)


def check_quickstart(options: argparse.Namespace) -> None:
    def command(workdir: pathlib.Path) -> list[str]:
        return [sys.executable, '-m', 'simrl.main', '--config=configs/quickstart.py:smoke', f'--workdir={workdir}']

    unbroken, broken = options.unbroken or options.workdir / 'unbroken', options.workdir / 'killed'
    if options.unbroken is None:
        subprocess.run(command(unbroken), check=True, stdout=subprocess.DEVNULL)
    timings = json.loads((unbroken / RESULTS_FOLDER / TIMINGS).read_text())
    seconds = sum(timings['stages'].values()) / 2
    print(f'quickstart: the stages of an unbroken run took {2 * seconds:.0f} s', flush=True)
    moments = random.Random(options.seed)
    kills = 0
    while kills < options.kills:
        # So late that most processes get to work, and so early that a run sees many of them.
        wait = START_SECONDS + moments.uniform(0.0, 0.5) * seconds
        process = subprocess.Popen(command(broken), stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            done = len(list(broken.rglob('done.json')))
            print(f'kill {kills}: after {wait:.1f} s, {done} stages done', flush=True)
            continue
        if process.returncode:
            raise SystemExit(
                f'quickstart: expected it to go on after {kills} kills, found exit code {process.returncode}'
            )
        compare_results(unbroken, broken)
        print(f'quickstart: the run ended after {kills} kills, results equal; once more from nothing', flush=True)
        broken = broken.with_name(f'{broken.name}-on')
    subprocess.run(command(broken), check=True, stdout=subprocess.DEVNULL)
    compare_results(unbroken, broken)
    print(f'quickstart: {options.kills} kills, the bytes of all results equal', flush=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = parser.add_subparsers(dest='check', required=True)
    stages = checks.add_parser('stages', help='fine-tuning and RL')
    stages.add_argument('--model', required=True, help='as --config.model.source')
    stages.add_argument('--data', required=True, help='as --config.data.folder')
    quickstart = checks.add_parser('quickstart', help='the whole experiment with a known answer')
    quickstart.add_argument('--unbroken', type=pathlib.Path, help='a finished run to compare with; None makes one')
    for check, kills in ((stages, 10), (quickstart, 20)):
        check.add_argument('--workdir', required=True, type=pathlib.Path, help='a new folder')
        check.add_argument('--kills', type=int, default=kills, help='of each job')
        check.add_argument('--seed', type=int, default=0, help='of the moments')
    options = parser.parse_args()
    if options.workdir.exists():
        raise SystemExit(f'{options.workdir}: expected no such folder yet, found one')
    {'stages': check_stages, 'quickstart': check_quickstart}[options.check](options)


if __name__ == '__main__':
    main()
