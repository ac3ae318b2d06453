"""Long checks of what must hold: `kill -9` at random moments of real stages, each followed by the same command.

    python -m tools.soak --model=SmolLM2-135M-Instruct.gguf --data=FOLDER --workdir=DIR [--kills=10] [--seed=0]

Runs fine-tuning of the user simulator and RL of an assistant once without and once with kills (a small random model,
the given tokenizer and conversations), prints step and phase of each kill, and compares every value and step of
metrics.jsonl, the conversations and TensorBoard; quantities of the clock (`time/`) are exempt.
"""

import argparse
import pathlib
import subprocess
import sys
import time

from tests.kills import assert_same_run, run_with_kills

STEPS = {'sft_user': ('--config.user_sft.sft.steps=60',), 'rl': ('--config.rl.steps=40',)}


def commands(name: str, options: argparse.Namespace, workdir: pathlib.Path) -> list[str]:
    """The job `name` of configs/, small, in `workdir`."""
    common = [f'--config.model.source={options.model}', f'--config.data.folder={options.data}']
    every = ['--config.computing.loop.checkpoint_every=3', *STEPS.get(name, ())]
    if name == 'rl':
        every.append(f'--config.reward_stage={options.workdir}/reward_model/reward_model/train')
    if name == 'sft_user':
        every.append('--config.computing.loop.evaluate_every=20')
    config = f'--config=configs/{name}.py:smoke'
    return [sys.executable, '-m', 'simrl.main', config, f'--workdir={workdir}', *common, *every]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='as --config.model.source')
    parser.add_argument('--data', required=True, help='as --config.data.folder')
    parser.add_argument('--workdir', required=True, type=pathlib.Path, help='a new folder')
    parser.add_argument('--kills', type=int, default=10, help='of each job')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    options = parser.parse_args()
    if options.workdir.exists():
        raise SystemExit(f'{options.workdir}: expected no such folder yet, found one')
    subprocess.run(commands('reward_model', options, options.workdir / 'reward_model'), check=True)
    for name in ('sft_user', 'rl'):
        unbroken, broken = options.workdir / f'{name}-unbroken', options.workdir / f'{name}-killed'
        started = time.monotonic()
        subprocess.run(commands(name, options, unbroken), check=True)
        seconds = time.monotonic() - started
        print(f'{name}: unbroken {seconds:.0f} s', flush=True)
        run_with_kills(commands(name, options, broken), broken, options.kills, options.seed, lines=2, span=2.0)
        assert_same_run(unbroken, broken)
        print(f'{name}: {options.kills} kills, every value and step equal', flush=True)


if __name__ == '__main__':
    main()
