"""A run directory -> the card of one of its simulators.

1. `results_now`: results/*.json, where they are of the stages that are done now; else results of what is done.
2. `facts_of`: what stages say of the simulator alone: what it is made of, how conversations with it went, seconds.
3. `evaluation.card` joins them.

Nothing is written and no weights are loaded.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simrl.evaluation.card import (
    COMPARE,
    FORECAST,
    MAKE,
    MEASURE,
    MEET,
    TRAIN,
    Conversations,
    Cost,
    Facts,
    Identity,
    SimulatorCard,
    Training,
    card_of,
)
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.files import RESULTS_FOLDER, Results
from simrl.evaluation.results.measures import INITIAL
from simrl.experiments import plan
from simrl.experiments.experiment import results_spec
from simrl.experiments.outputs import metric_lines, read_result
from simrl.experiments.results import ResultsSpec, results_of
from simrl.experiments.scene import Scene
from simrl.run import config as config_lib
from simrl.run import directory, stage_files, stages
from simrl.run.config import ConfigError
from simrl.run.metrics import ENDPOINT
from simrl.run.stage_files import WorkdirError, is_done, shorten

COUNTS = ('later_messages', 'repeated', 'resampled', 'missed_signals')  # statistics of users' messages


def simulator_card(scene: Scene, arm: str) -> SimulatorCard:
    """The card of the simulator of an arm.

    Raises:
        ConfigError: the run has no such arm.
        WorkdirError: not even the initial assistant is measured, or a file of the run is damaged.
    """
    if arm not in scene.settings.arms:
        raise ConfigError(
            f'{scene.workdir}: expected one of its arms ({", ".join(scene.settings.arms)}), found {arm!r}'
        )
    return card_of(arm, results_now(scene, arm), facts_of(scene, arm), result_files.read_added(scene.workdir))


def results_now(scene: Scene, arm: str) -> Results:
    """The results of a run, as far as its stages are done.

    Those that were written serve, with the arm among them, unless a stage was run since; then they are made anew of the
    stages that are done, but for what other arms' simulators say in people's place.
    """
    spec = results_spec(scene)
    if (scene.workdir / RESULTS_FOLDER / 'timings.json').exists():
        written = result_files.read(scene.workdir)
        known = written.timings.stages
        if arm in written.experiment.arms and all(known.get(name) == seconds for name, seconds in spec.seconds.items()):
            return written
    found = so_far(spec, scene.workdir)
    simulators = {  # to describe what all of them say in people's place takes minutes
        name: x if x.arm == arm else dataclasses.replace(x, replay=None) for name, x in found.simulators.items()
    }
    return results_of(dataclasses.replace(found, simulators=simulators), scene.workdir)


def so_far(spec: ResultsSpec, workdir: pathlib.Path) -> ResultsSpec:
    """The part of a run's results whose stages are done.

    An assistant is among them once it is trained and measured. The matrix has the simulators that the initial assistant
    has met, and of these assistants those that have met all of them.

    Raises:
        WorkdirError: the initial assistant is not measured.
    """

    def done(stage: str) -> bool:
        return is_done(workdir / stage)

    missing = [stage for measure in spec.measures.values() for stage in measure.stages[INITIAL] if not done(stage)]
    if missing:
        raise WorkdirError(f'{workdir}: expected at least {shorten(missing)} finished, found no results yet')
    assistants = {
        name: found
        for name, found in spec.assistants.items()
        if done(found.rl) and all(done(stage) for measure in spec.measures.values() for stage in measure.stages[name])
    }
    named = (INITIAL, *assistants)
    met = {
        who: {simulator: stage for simulator, stage in spec.matrix.stages[who].items() if done(stage)} for who in named
    }

    forecast = spec.forecast
    if forecast is not None:
        finished = {arm: of for arm, of in forecast.stages.items() if done(forecast.people) and all(map(done, of))}
        forecast = dataclasses.replace(forecast, stages=finished) if finished else None

    def arms(found: Iterable[str]) -> set[str]:
        return {spec.simulators[simulator].arm for simulator in found if simulator in met[INITIAL]}

    return dataclasses.replace(
        spec,
        assistants=assistants,
        measures={
            name: dataclasses.replace(measure, stages={who: measure.stages[who] for who in named})
            for name, measure in spec.measures.items()
        },
        simulators={
            name: dataclasses.replace(
                found,
                likelihood=found.likelihood if found.likelihood and done(found.likelihood) else None,
                replay=found.replay if found.replay and done(found.replay) else None,
            )
            for name, found in spec.simulators.items()
        },
        matrix=dataclasses.replace(
            spec.matrix,
            stages={
                who: {simulator: stage for simulator, stage in found.items() if simulator in met[INITIAL]}
                for who, found in met.items()
                if arms(found) == arms(met[INITIAL])
            },
        ),
        forecast=forecast,
    )


def facts_of(scene: Scene, arm: str) -> Facts:
    """Facts about the simulator of an arm, of the stages of its run."""
    names = [name for name, (of, _) in plan.simulators(scene).items() if of == arm]
    runs = [plan.rl_stage(arm, seed) for of, seed in plan.runs(scene) if of == arm]
    with_it = [
        plan.matrix_stage(who, name)
        for who, assistant in plan.assistants(scene).items()
        for name in plan.simulators_met(scene, assistant.seed)
        if name in names
    ]
    return Facts(
        identity=_identity(scene, arm, [*with_it, *runs]),
        conversations=_conversations([read_result(folder) for folder in _done(scene, with_it)]),
        training=_training([metric_lines(folder) for folder in _done(scene, runs)]),
        cost=_cost(scene, arm, names, runs, with_it),
    )


def _done(scene: Scene, names: Sequence[str]) -> list[pathlib.Path]:
    return [scene.workdir / name for name in names if is_done(scene.workdir / name)]


def _identity(scene: Scene, arm: str, using: Sequence[str]) -> Identity:
    """The simulator as the first stage that was started with it has it; as the config has it where none was."""
    config = directory.stored_config(scene.workdir)
    assert config is not None  # a scene of a run directory was made of it
    depends_on = config_lib.identity({**scene.identity(), **scene.simulator_identity(arm)})
    inputs: dict[str, str] = {}
    for name in using:
        started = stage_files.read_started(scene.workdir / name)
        if started is None:
            continue
        if not inputs:
            depends_on = {key: started['settings'].get(key, value) for key, value in depends_on.items()}
        own = {
            f'{key} of seed {seed}' if scene.simulator_per_seed(arm) else key: key
            for seed in scene.settings.seeds
            for key in scene.simulator_inputs(arm, seed)
            if not scene.simulator_per_seed(arm) or name.endswith(f'/seed-{seed}')
        }
        for shown, key in ({key: key for key in scene.inputs()} | own).items():
            if key in started['inputs']:
                inputs.setdefault(shown, started['inputs'][key])
    return Identity(
        run=scene.workdir.absolute().name,
        version=str(config['version']),
        scene=scene.settings.scene,
        kind=scene.arm_kind(arm),
        model=scene.model_name(arm),
        held_out=arm in scene.settings.held_out_simulators,
        settings=config_lib.identity(scene.settings.arms[arm]),
        depends_on=depends_on,
        inputs=inputs,
    )


def _conversations(found: Sequence[Mapping[str, Any]]) -> Conversations | None:
    """Sums over the stages that held conversations with a simulator."""
    if not found:
        return None
    outcomes = [result['outcomes'] for result in found]
    held = [x for columns in outcomes for x in columns['example']]
    causes = [x for columns in outcomes for x in columns.get('cause', []) if x]
    ends = [x for columns in outcomes for x in columns['end'] if x is not None]
    counted = [name for name in COUNTS if all(name in result['statistics'] for result in found)]
    return Conversations(
        stages=len(found),
        held=len(held),
        causes=dict(collections.Counter(causes).most_common()),
        ends=dict(collections.Counter(ends).most_common()),
        truncated=sum(bool(x) for columns in outcomes for x in columns['user_truncated']),
        counts={name: sum(result['statistics'][name] for result in found) for name in counted},
    )


def _training(runs: Sequence[Sequence[Mapping[str, Any]]]) -> Training | None:
    """Means over logged lines, and the usage of endpoints: a line has the mean over the steps since the one before."""
    if not runs:
        return None
    values: dict[str, list[float]] = {}
    usage: dict[str, dict[str, float]] = {}
    lines = 0
    for run in runs:
        step = 0
        for line in run:
            if 'grad_norm' not in line:
                continue  # of a validation alone
            lines += 1
            for metric, value in line.items():
                if value is None:
                    continue
                if metric.startswith(ENDPOINT):
                    model, _, name = metric.removeprefix(ENDPOINT).rpartition('/')
                    total = usage.setdefault(model, {})
                    total[name] = total.get(name, 0.0) + value * (line['step'] - step)
                elif metric.startswith(('reward/', 'rollout/')):
                    values.setdefault(metric, []).append(value)
            step = line['step']
    rates = {metric: sum(found) / len(found) for metric, found in values.items()}
    return Training(runs=len(runs), lines=lines, rates=rates, usage=usage)


def _cost(scene: Scene, arm: str, names: Sequence[str], runs: Sequence[str], with_it: Sequence[str]) -> Cost:
    """Seconds of the stages that a simulator takes part in."""
    made = {
        folder.relative_to(scene.workdir).as_posix(): None
        for seed in scene.settings.seeds
        for folder in scene.simulator_inputs(arm, seed).values()
        if folder.is_relative_to(scene.workdir)
    }
    own = {who: assistant for who, assistant in plan.assistants(scene).items() if assistant.stage in runs}
    blocks = range(len(scene.settings.evaluation.blocks()))
    measured = [plan.measure_stage(name, who, block) for who in own for name in scene.measures() for block in blocks]
    measured += [
        plan.matrix_stage(who, name)
        for who, assistant in own.items()
        for name in plan.simulators_met(scene, assistant.seed)
        if name not in names
    ]
    forecast = plan.forecast_spec(scene)
    purposes = {
        MAKE: list(made),
        TRAIN: runs,
        MEASURE: measured,
        MEET: with_it,
        COMPARE: [
            *(plan.likelihood_stage(name) for name in names),
            *(plan.replay_stage(name) for name in names if name in plan.replayed_simulators(scene)),
        ],
        FORECAST: [forecast.people, *forecast.stages[arm]] if forecast and arm in forecast.stages else [],
    }
    seconds = {
        purpose: {name: stages.stage_seconds(scene.workdir / name) for name in found if is_done(scene.workdir / name)}
        for purpose, found in purposes.items()
        if found
    }
    unfinished = {
        purpose: tuple(name for name in found if not is_done(scene.workdir / name))
        for purpose, found in purposes.items()
    }
    return Cost(seconds, {purpose: found for purpose, found in unfinished.items() if found})
