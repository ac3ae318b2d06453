"""Simulators of graded quality in the concierge world: how well a forecast orders them by the utility that comes out.

    python -m tools.graded --workdir=DIR [--config=configs/quickstart.py] [--seeds 0 1] [--people=1000]
        [--examples=256] [--samples=8]

One run with twelve arms. Five are people's own program with traits between the stereotype that role-play knows (dial 0)
and people as they are (dial 1); the others are language models: role-play of each stereotype, one drawn for each
conversation, and one fine-tuned on people. Each simulator's utility is forecast from the initial assistant alone, then
an assistant is trained against it and meets people. It prints both beside each other, their rank correlations and what
the forecasts cost, and leaves them in DIR/results/forecast.json. Runs are resumed.

What came out with 1,000 people and seeds 0 and 1, Spearman's rho over the twelve with gain [over resampled arms], and p
of a permutation: cosine .68 [-.01, .93], p .018; best of 4 .36 [-.55, .94], p .25. The gains of the two seeds have .84.
Cosines are .94 to 1.00, but for `impatient` (.82), within .01 to .04; with 64 examples within .05 to .2, which orders
them by noise.
"""

import argparse
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from simrl.evaluation.report.summary import bounds, interval, number
from simrl.evaluation.results.files import RESULTS_FOLDER, Results
from simrl.evaluation.results.simulators import ForecastResult
from simrl.experiments.concierge_settings import ConciergeSimulator
from simrl.experiments.settings import ForecastSettings
from simrl.run.config import local_path, to_config_dict
from simrl.run.program import run_child, run_program
from simrl.worlds.concierge.people import STEREOTYPES
from tools.controls import read_results, whole_config
from tools.dialled import DIALS

KINDS = ('role_play', 'persona', *(name for name in STEREOTYPES if name != 'default'), 'fine_tuned')
FEW = 16  # conversations of a cell of the matrix, which no number here is of


def get_config(path: str) -> ConfigDict:
    """The config of the run: that of another file, FILE.py[:arg], with these arms."""
    config = whole_config(path)
    arms = {f'dial_{dial}': ConciergeSimulator(f'tools.dialled:dial_{dial}') for dial in DIALS}
    arms |= {kind: ConciergeSimulator(kind) for kind in KINDS}
    with config.unlocked(), config.ignore_type():
        config.arms = ConfigDict({name: to_config_dict(arm) for name, arm in arms.items()}, sort_keys=False)
        config.evaluation.forecast = to_config_dict(ForecastSettings())
        config.evaluation.matrix = FEW
    return config


def table(found: Results, forecast: ForecastResult) -> str:
    """A line for each arm, the most useful first; then the correlations and the cost."""
    arms = found.measures[forecast.measure].arms
    lines = [f'{"simulator":<14}{"gain":>8}{"win rate":>10}   {"cosine":<24}best of {forecast.n}']
    for arm in sorted(forecast.simulators, key=lambda arm: -arms[arm].gain.mean):
        known = forecast.simulators[arm]
        lines.append(
            f'{arm:<14}{number(arms[arm].gain.mean, 3, "+"):>8}{number(arms[arm].win_rate.mean, 3):>10}   '
            f'{interval(known.cosine, 2):<24}{interval(known.best_of_n, 3, "+")}'
            f'{f"   ({known.reason})" if known.reason else ""}'
        )
    lines.append('')
    for x in forecast.correlations:
        said = 'none'
        if x.mean is not None:
            said = f'{number(x.mean, 2, "+")} {bounds(x.low, x.high, 2, "+")}, p = {number(x.p_value, 4)}'
        lines.append(f'{x.forecast} with {x.utility}, over {x.num_arms} simulators: {said}')
    return '\n'.join([*lines, '', cost_of(found, forecast)])


def cost_of(found: Results, forecast: ForecastResult) -> str:
    """A forecast's seconds beside those of a training."""
    seconds = found.timings.stages
    arms = len(forecast.simulators)
    own = sum(seconds[stage] for known in forecast.simulators.values() for stage in known.stages)
    trained = [seconds[f'rl/{name}'] for name, run in found.experiment.runs.items() if run.arm in forecast.simulators]
    each, training = (own + seconds[forecast.people_stage]) / arms, sum(trained) / len(trained)
    return (
        f'A forecast took {each:.0f} s, people’s side shared by {arms} simulators, and a training {training:.0f} s: '
        f'{each / training:.1%}.'
    )


def show(options: argparse.Namespace) -> None:
    command = [
        *(sys.executable, '-m', 'simrl.main', f'--config={__file__}:{options.config}'),
        f'--workdir={options.workdir}',
        f'--config.seeds=({", ".join(map(str, options.seeds))},)',
        f'--config.evaluation.forecast.examples={options.examples}',
        f'--config.evaluation.forecast.samples={options.samples}',
        *(
            ()
            if options.people is None
            else (f'--config.evaluation.people={options.people}', f'--config.evaluation.block={options.people}')
        ),
    ]
    run_child(command)
    found = read_results(options.workdir)
    assert found.forecast is not None
    print(f'\n{table(found, found.forecast)}\n{options.workdir / RESULTS_FOLDER / "forecast.json"}')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, type=local_path)
    parser.add_argument('--config', default='configs/quickstart.py')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--people', type=int, help='new people that every assistant meets; as the config has it')
    parser.add_argument('--examples', type=int, default=256, help='people of the forecast')
    parser.add_argument('--samples', type=int, default=8, help='conversations of each')
    show(parser.parse_args(arguments))


if __name__ == '__main__':
    run_program(main)
