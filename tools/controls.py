"""The instrument's negative controls in the concierge world: where it must find nothing, and a gap that must open.

    python -m tools.controls --workdir=DIR [--config=configs/quickstart.py] [--dials 0 0.5 0.8 1] [--seeds 0 1 2 3]

One run for each dial: at 0 people are the stereotype that role-play knows, so fine-tuning on people may gain nothing;
at 1 they are as the world describes them. The gap between fine-tuned and role-play must open from one to the other.
Within each run the seeds of one arm, split in halves, are the same simulator twice. Every run goes on where it was; the
table is also written to DIR/controls.json.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

from simrl import config
from simrl.evaluation import results
from simrl.evaluation.controls import same_simulator_twice
from simrl.evaluation.people import split_name

ARMS = ('role_play', 'fine_tuned')
PAIR = 'fine_tuned - role_play'


def run(options: argparse.Namespace, dial: float) -> pathlib.Path:
    """The run of one dial: the config with two arms."""
    workdir: pathlib.Path = options.workdir / f'dial-{dial:g}'
    subprocess.run(
        [
            sys.executable,
            '-m',
            'simrl.main',
            f'--config={options.config}',
            f'--workdir={workdir}',
            f'--config.world.dial={dial}',
            f'--config.arms={ARMS}',
            f'--config.seeds=({", ".join(map(str, options.seeds))},)',
        ],
        check=True,
    )
    return workdir


def row(workdir: pathlib.Path, dial: float) -> dict[str, Any]:
    """What one dial's run says of the pair of arms, and of each arm against itself."""
    found = results.read(workdir)
    if found.people is None or found.claims is None:
        raise SystemExit(f'{workdir}: expected results, found none')
    runs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for name, result in found.people.assistants.items():
        if name != results.INITIAL:
            runs[split_name(name)[0]].append(result.satisfaction.mean)
    return {
        'dial': dial,
        'satisfaction': {arm: sum(values) / len(values) for arm, values in runs.items()},
        'gap': found.claims.differences[PAIR].satisfaction,
        'same_twice': same_simulator_twice(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, type=pathlib.Path, help='of all runs')
    parser.add_argument('--config', default='configs/quickstart.py')
    parser.add_argument('--dials', type=float, nargs='+', default=[0.0, 0.5, 0.8, 1.0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3])
    options = parser.parse_args()
    rows = [row(run(options, dial), dial) for dial in options.dials]
    options.workdir.mkdir(parents=True, exist_ok=True)
    (options.workdir / 'controls.json').write_text(json.dumps(config.to_dict(rows), indent=1) + '\n')
    print(f'\n{"dial":>6}{"role-play":>12}{"fine-tuned":>12}   gap over seeds           same simulator twice')
    for r in rows:
        gap, twice = r['gap'], r['same_twice']
        interval = '' if gap.low is None else f' [{gap.low:+.3f}, {gap.high:+.3f}]'
        told = '-' if twice.told_apart is None else f'{twice.told_apart:.0%} of {twice.splits} told apart'
        means = ''.join(f'{r["satisfaction"][arm]:>12.3f}' for arm in ARMS)
        print(f'{r["dial"]:>6g}{means}   {gap.mean:+.3f}{interval:<18}  {told}')


if __name__ == '__main__':
    main()
