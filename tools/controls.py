"""Negative controls of the instrument in the concierge world: no difference, and a gap that must open.

    python -m tools.controls twice --run=DIR
    python -m tools.controls dial --workdir=DIR [--config=configs/quickstart.py] [--dials 0 0.5 0.8 0.9 1]
        [--seeds 0 1 2 3] [--people=1000]

`twice` reads a finished run of at least four seeds: halves of the seeds of one arm are the same simulator twice. It
prints how often intervals over people separate them; those over seeds do in about one case of twenty by construction.

`dial` makes one run for each dial, with the arms role_play and fine_tuned alone. At 0 people are the stereotype that
role-play knows, so fine-tuning on people should gain nothing; at 1 they are as the world describes them. The gap must
open from 0 to 1. The gain at 0 is reported as a bound, as few seeds cannot separate a small gain from none. Runs are
resumed; the table is also written to DIR/controls.json and DIR/controls.png.
"""

import argparse
import json
import pathlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from simrl.evaluation.controls import MIN_SEEDS, Opening, SameTwice, opening, same_simulator_twice
from simrl.evaluation.report import summary
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import INITIAL
from simrl.evaluation.seeds import SeedEstimate
from simrl.run import config
from simrl.run.config import local_path
from simrl.run.program import run_child, run_program

ARMS = ('role_play', 'fine_tuned')
PAIR = ('fine_tuned', 'role_play')
OPENS = {True: 'opens', False: 'does NOT open', None: 'may or may not open'}


def twice(run: pathlib.Path) -> dict[str, SameTwice]:
    """Each arm of a finished run against itself."""
    found = read_results(run)
    scores = found.scores.measures[found.experiment.measures[0]].assistants
    arms = {arm: found.experiment.assistants_of(arm) for arm in found.measures[found.experiment.measures[0]].arms}
    if (fewest := min(map(len, arms.values()))) < MIN_SEEDS:
        raise SystemExit(f'{run}: expected at least {MIN_SEEDS} training seeds, found {fewest}')
    of_arms = {arm: np.array([scores[name] for name in names], np.float64) for arm, names in arms.items()}
    return {  # on the people that all of an arm's assistants have a score of; None becomes NaN
        arm: same_simulator_twice(np.compress(~np.isnan(found).any(axis=0), found, axis=1))
        for arm, found in of_arms.items()
    }


def read_results(run: pathlib.Path) -> Results:
    """The results of a finished run; without them the program ends with a line that says so."""
    try:
        return result_files.read(run)
    except config.ConfigError as error:
        raise SystemExit(str(error)) from error


def whole_config(path: str) -> ConfigDict:
    """The config of a file, FILE.py[:arg]."""
    file, _, argument = path.partition(':')
    config: ConfigDict = runpy.run_path(file)['get_config'](*([argument] if argument else []))
    return config


def get_config(path: str) -> ConfigDict:
    """The config of a run of the dial: that of another file, FILE.py[:arg], with the two arms alone."""
    found = whole_config(path)
    with found.unlocked():
        for arm in [arm for arm in found.arms if arm not in ARMS]:
            del found.arms[arm]
    return found


def run_dial(options: argparse.Namespace, dial: float) -> pathlib.Path:
    """The run of one dial."""
    workdir: pathlib.Path = options.workdir / f'dial-{dial:g}'
    command = [
        *(sys.executable, '-m', 'simrl.main', f'--config={__file__}:{options.config}', f'--workdir={workdir}'),
        f'--config.world.dial={dial}',
        f'--config.seeds=({", ".join(map(str, options.seeds))},)',
        *(() if options.people is None else (f'--config.evaluation.people={options.people}',)),
    ]
    run_child(command)
    return workdir


def row(workdir: pathlib.Path, dial: float) -> dict[str, Any]:
    """The results of one dial's run, of the two arms."""
    found = read_results(workdir)
    measure = found.measures[found.experiment.measures[0]]
    return {
        'dial': dial,
        'initial': measure.assistants[INITIAL].score,
        'satisfaction': {arm: measure.arms[arm].score for arm in ARMS},
        'gap': next(x.score for x in measure.differences if (x.first, x.second) == PAIR),
        'nats_per_token': {arm: found.fidelity.simulators[arm].nats_per_token for arm in ARMS},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each dial."""
    lines = [f'{"dial":>5}{"initial":>10}{"role-play":>11}{"fine-tuned":>12}   {"gap over seeds":<28}nats a token']
    for r in rows:
        means = ''.join(f'{r["satisfaction"][arm].mean:>{width}.3f}' for arm, width in zip(ARMS, (11, 12), strict=True))
        nats = ', '.join(f'{arm} {r["nats_per_token"][arm].mean:.3f}' for arm in ARMS)
        gap = summary.interval(r['gap'], 3, '+')
        lines.append(f'{r["dial"]:>5g}{r["initial"].mean:>10.3f}{means}   {gap:<28}{nats}')
    return '\n'.join(lines)


def verdict(found: Opening) -> str:
    """The outcome of the dial as sentences."""
    steps = ', '.join(summary.interval(step, 3, '+') for step in found.steps)
    return '\n'.join(
        (
            _first_gap(found),
            f'The gap {OPENS[found.monotone]} monotonically, as far as the seeds can tell: '
            f'from dial to dial {steps}; slope {summary.interval(found.slope, 3, "+")}.',
        )
    )


def _first_gap(found: Opening) -> str:
    """The gain where there should be none, as a bound: few seeds cannot show that there is none."""
    gap = found.first
    above = sum(value > 0 for value in gap.values)
    seeds = f'{summary.interval(gap, 3, "+")}, above 0 in {above} of {gap.num_seeds} seeds'
    if found.closed is None:
        return f'At the first dial the seeds do not differ, which bounds nothing: {seeds}.'
    if not found.closed:
        return f'At the first dial there IS a gain: {seeds}.'
    if gap.sign == -1:
        return f'At the first dial fine-tuning gains nothing, it loses: {seeds}.'
    share = '' if found.at_most is None else f', {found.at_most:.0%} of the gap at the last dial'
    return f'At the first dial the gain is at most {summary.number(gap.high, 3, "+")}{share}: {seeds}.'


def picture(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """The gap by dial, a point per seed, with intervals."""
    figure = Figure((4.8, 3.2), layout='constrained')
    axis = figure.subplots()
    for r in rows:
        gap: SeedEstimate = r['gap']
        axis.plot([r['dial']] * gap.num_seeds, gap.values, '.', color='#0072b2', alpha=0.4)
        if gap.low is not None and gap.high is not None:
            axis.plot([r['dial']] * 2, [gap.low, gap.high], color='#0072b2')
    axis.plot([r['dial'] for r in rows], [r['gap'].mean for r in rows], 'o-', color='#0072b2')
    axis.axhline(0, color='#6b6b6b', linewidth=1, linestyle='--')
    axis.set_xlabel('dial: 0 people are the stereotype, 1 people as described')
    axis.set_ylabel('satisfaction, fine-tuned − role-play')
    figure.savefig(path, dpi=150)


def show_twice(options: argparse.Namespace) -> None:
    found = twice(options.run)
    print(f'{"arm":<20}{"halvings":>9}{"over seeds":>12}{"over people":>13}{"largest":>9}   (intervals that miss 0)')
    for arm, x in found.items():
        print(f'{arm:<20}{x.splits:>9}{x.over_seeds:>12.1%}{x.over_people:>13.1%}{x.largest:>9.3f}')
    means = [float(np.mean([getattr(x, field) for x in found.values()])) for field in ('over_seeds', 'over_people')]
    print(f'{"mean":<29}{means[0]:>12.1%}{means[1]:>13.1%}')


def show_dial(options: argparse.Namespace) -> None:
    rows = [row(run_dial(options, dial), dial) for dial in sorted(options.dials)]
    found = opening([r['dial'] for r in rows], np.array([r['gap'].values for r in rows]))
    content = config.to_dict({'dials': rows, 'opening': found})
    (options.workdir / 'controls.json').write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    picture(rows, options.workdir / 'controls.png')
    print(f'\n{table(rows)}\n{verdict(found)}')


def _check_dial(options: argparse.Namespace) -> None:
    """Refuses options that no run could serve."""
    if len(set(options.seeds)) < 2:
        raise SystemExit(f'--seeds: expected at least two, found {options.seeds}')
    folders = {f'{dial:g}' for dial in options.dials}  # as `run_dial` names them
    if len(folders) < max(2, len(options.dials)) or not all(0 <= dial <= 1 for dial in options.dials):
        raise SystemExit(f'--dials: expected at least two different numbers from 0 to 1, found {options.dials}')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    controls = parser.add_subparsers(dest='control', required=True)
    same = controls.add_parser('twice', help='one simulator twice')
    same.add_argument('--run', required=True, type=local_path, help='a finished run of at least four seeds')
    dial = controls.add_parser('dial', help='from the stereotype to people')
    dial.add_argument('--workdir', required=True, type=local_path, help='of all runs')
    dial.add_argument('--config', default='configs/quickstart.py')
    dial.add_argument('--dials', type=float, nargs='+', default=[0.0, 0.5, 0.8, 0.9, 1.0])
    dial.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3])
    dial.add_argument('--people', type=int, help='new people that every assistant meets; as the config has it')
    options = parser.parse_args(arguments)
    if options.control == 'dial':
        _check_dial(options)
    {'twice': show_twice, 'dial': show_dial}[options.control](options)


if __name__ == '__main__':
    run_program(main)
