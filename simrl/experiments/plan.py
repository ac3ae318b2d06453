"""One experiment, whatever its scene: one assistant per simulator and training seed, all else equal, then compared.

`plan` reads as the experiment does:
1. The scene's own stages: data, fine-tuning, reward models.
2. forecast/SIMULATOR: what can be known of each simulator's utility before anything is trained against it, with
   people_forecast, where `evaluation.forecast` is set.
3. rl/ARM/seed-K: for each arm and seed an assistant is RL-trained against that arm's simulator. An arm of
   `held_out_simulators` trains none.
4. MEASURE/ASSISTANT/block-I: each assistant on the scene's measures, on people that no simulator saw.
5. matrix/ASSISTANT/SIMULATOR: each assistant with each simulator.
6. likelihood/SIMULATOR: how well each simulator predicts what people said.
7. replay/SIMULATOR: what each simulator says in people's place, turn by turn; none without `evaluation.replayed`.

Stages talk through the run directory alone, so arms, seeds and people can be added later. Listing them loads no model.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from simrl.evaluation.results.measures import INITIAL
from simrl.experiments import forecasts, replays, work
from simrl.experiments.endpoints import Work, showing_usage
from simrl.experiments.forecast_results import ForecastSpec
from simrl.experiments.scene import Measure, Scene
from simrl.experiments.settings import EvaluationSettings
from simrl.run.stages import Stage

MATRIX, LIKELIHOOD, REPLAY, FORECAST = 'matrix', 'likelihood', 'replay', 'forecast'
FORECAST_PEOPLE = 'people_forecast'  # people's side of all forecasts


def rl_stage(arm: str, seed: int) -> str:
    return f'rl/{arm}/seed-{seed}'


def measure_stage(measure: str, assistant: str, block: int) -> str:
    return f'{measure}/{assistant}/block-{block}'


def matrix_stage(assistant: str, simulator: str) -> str:
    return f'{MATRIX}/{assistant}/{simulator}'


def likelihood_stage(simulator: str) -> str:
    return f'{LIKELIHOOD}/{simulator}'


def forecast_stage(simulator: str) -> str:
    return f'{FORECAST}/{simulator}'


def replay_stage(simulator: str) -> str:
    return f'{REPLAY}/{simulator}'


def runs(scene: Scene) -> Iterator[tuple[str, int]]:
    """Every training: an arm and a training seed."""
    settings = scene.settings
    for seed in settings.seeds:
        for arm in settings.arms:
            if arm not in settings.held_out_simulators:
                yield arm, seed


@dataclasses.dataclass(frozen=True)
class Assistant:
    """An assistant that is measured.

    Attributes:
        stage: the stage that left it; None where it is the pretrained model itself.
        seed: its training seed; None for the initial assistant.
    """

    stage: str | None
    seed: int | None


def assistants(scene: Scene) -> dict[str, Assistant]:
    """Every assistant by name, the initial one first."""
    trained = {f'{arm}/seed-{seed}': Assistant(rl_stage(arm, seed), seed) for arm, seed in runs(scene)}
    return {INITIAL: Assistant(scene.assistant_stage, None), **trained}


def simulators(scene: Scene) -> dict[str, tuple[str, int]]:
    """Every simulator's name, with an arm and a seed that has it; people are none."""
    return {
        simulator_name(scene, arm, seed): (arm, seed)
        for seed in scene.settings.seeds
        for arm in scene.settings.arms
        if not scene.is_people(arm)
    }


def replayed_simulators(scene: Scene) -> dict[str, tuple[str, int]]:
    """The simulators that replay people's conversations."""
    return simulators(scene) if scene.settings.evaluation.replayed else {}


def simulator_name(scene: Scene, arm: str, seed: int) -> str:
    return f'{arm}/seed-{seed}' if scene.simulator_per_seed(arm) else arm


def simulators_met(scene: Scene, seed: int | None) -> dict[str, tuple[str, int]]:
    """The simulators that an assistant of a training seed meets; None: the initial assistant, which meets all."""
    if seed is None:
        return simulators(scene)
    arms = [arm for arm in scene.settings.arms if not scene.is_people(arm)]
    return {simulator_name(scene, arm, seed): (arm, seed) for arm in arms}


def measures_off(settings: EvaluationSettings) -> dict[str, str]:
    """The measures of simulators that are off: folder of their stages -> the setting that switches them on."""
    found = {} if settings.replayed else {REPLAY: 'config.evaluation.replayed=N'}
    if settings.forecast is None:
        found |= dict.fromkeys((FORECAST, FORECAST_PEOPLE), 'config.evaluation.forecast.examples=N')
    return found


def plan(scene: Scene) -> list[Stage]:
    """All stages; each comes after those that it reads."""
    stages = [
        *scene.setup(),
        *_forecasts(scene),
        *(_train(scene, arm, seed) for arm, seed in runs(scene)),
        *(
            _measure(scene, name, measure, assistant, block)
            for assistant in assistants(scene)
            for name, measure in scene.measures().items()
            for block in range(len(scene.settings.evaluation.blocks()))
        ),
        *(
            _meet(scene, assistant, simulator, *of)
            for assistant, of_assistant in assistants(scene).items()
            for simulator, of in simulators_met(scene, of_assistant.seed).items()
        ),
        *(_likelihood(scene, simulator, *of) for simulator, of in simulators(scene).items()),
        *(_replay(scene, simulator, *of) for simulator, of in replayed_simulators(scene).items()),
    ]
    return [dataclasses.replace(stage, run=showing_usage(stage.run, scene.usage)) for stage in stages]


def _stage(
    scene: Scene, name: str, settings: Mapping[str, Any], inputs: Mapping[str, pathlib.Path], run: Work
) -> Stage:
    """A stage in which agents talk."""
    return Stage(name, {**scene.identity(), **settings}, {**scene.inputs(), **inputs}, run, scene.check)


def _assistant_input(scene: Scene, assistant: str) -> dict[str, pathlib.Path]:
    stage = assistants(scene)[assistant].stage
    return {} if stage is None else {'assistant': scene.workdir / stage}


def _forecasts(scene: Scene) -> Iterator[Stage]:
    settings = scene.settings.evaluation
    if settings.forecast is None:
        return
    people = scene.people()
    identity = {
        **scene.examples_identity('dev'),
        **scene.reward_identity(),
        **people.identity,
        'forecast': settings.forecast,
        'lora': scene.settings.rl.lora,
        'seed': settings.seed,
    }
    inputs = {**_assistant_input(scene, INITIAL), **scene.reward_inputs(), **people.inputs}
    run: Work = functools.partial(forecasts.forecast_people, scene=scene)
    yield _stage(scene, FORECAST_PEOPLE, identity, inputs, run)
    for simulator, (arm, seed) in simulators(scene).items():
        folder = scene.workdir / FORECAST_PEOPLE
        yield _stage(
            scene,
            forecast_stage(simulator),
            {**identity, **scene.simulator_identity(arm)},
            {**inputs, **scene.simulator_inputs(arm, seed), 'people': folder},
            functools.partial(forecasts.forecast_simulator, scene=scene, arm=arm, seed=seed, people=folder),
        )


def forecast_spec(scene: Scene) -> ForecastSpec | None:
    """The stages of forecasts; None where there are none."""
    settings = scene.settings.evaluation.forecast
    if settings is None:
        return None
    stages: dict[str, list[str]] = {}
    for simulator, (arm, _) in simulators(scene).items():
        stages.setdefault(arm, []).append(forecast_stage(simulator))
    return ForecastSpec(scene.people().words, FORECAST_PEOPLE, stages, settings.n)


def _train(scene: Scene, arm: str, seed: int) -> Stage:
    settings = scene.settings
    identity = {
        **scene.simulator_identity(arm),
        **scene.examples_identity('train'),
        **scene.reward_identity(),
        'rl': settings.rl,
        'seed': seed,
    }
    inputs = {
        **_assistant_input(scene, INITIAL),
        **scene.reward_inputs(),
        **scene.simulator_inputs(arm, seed),
    }
    run = functools.partial(work.train_arm, scene=scene, arm=arm, seed=seed)
    return _stage(scene, rl_stage(arm, seed), identity, inputs, run)


def _measure(scene: Scene, name: str, measure: Measure, assistant: str, block: int) -> Stage:
    settings = scene.settings.evaluation
    numbers, shown = settings.blocks()[block], settings.shown if block == 0 else 0
    people = None if numbers is None else [numbers.start, numbers.stop]
    run = functools.partial(
        work.measure_assistant,
        scene=scene,
        measure=measure,
        stage=assistants(scene)[assistant].stage,
        numbers=numbers,
        shown=shown,
    )
    return _stage(
        scene,
        measure_stage(name, assistant, block),
        {
            **measure.identity,
            **scene.examples_identity('test'),
            'people': people,
            'seed': settings.seed,
            'shown': shown,
        },
        {**_assistant_input(scene, assistant), **measure.inputs},
        run,
    )


def _meet(scene: Scene, assistant: str, simulator: str, arm: str, seed: int) -> Stage:
    settings = scene.settings.evaluation
    run = functools.partial(
        work.meet_simulator, scene=scene, stage=assistants(scene)[assistant].stage, arm=arm, seed=seed
    )
    return _stage(
        scene,
        matrix_stage(assistant, simulator),
        {
            **scene.simulator_identity(arm),
            **scene.examples_identity('test'),
            **scene.reward_identity(),
            'conversations': settings.matrix,
            'seed': settings.seed,
        },
        {**_assistant_input(scene, assistant), **scene.reward_inputs(), **scene.simulator_inputs(arm, seed)},
        run,
    )


def _likelihood(scene: Scene, simulator: str, arm: str, seed: int) -> Stage:
    run = functools.partial(work.measure_likelihood, scene=scene, arm=arm, seed=seed)
    return _stage(
        scene,
        likelihood_stage(simulator),
        {**scene.simulator_identity(arm), **scene.likelihood_identity()},
        {**scene.likelihood_inputs(), **scene.simulator_inputs(arm, seed)},
        run,
    )


def _replay(scene: Scene, simulator: str, arm: str, seed: int) -> Stage:
    settings = scene.settings.evaluation
    return _stage(
        scene,
        replay_stage(simulator),
        {
            **scene.simulator_identity(arm),
            **scene.examples_identity('test'),
            'conversations': settings.replayed,
            'turns': settings.replayed_turns,
            'tokens': settings.replayed_tokens,
            'seed': settings.seed,
        },
        {**scene.likelihood_inputs(), **scene.simulator_inputs(arm, seed)},
        functools.partial(replays.replay_people, scene=scene, arm=arm, seed=seed),
    )
