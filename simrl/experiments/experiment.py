"""Run an experiment: config -> scene -> stages -> results. The same command runs what is missing.

`SCENES` names the settings and the scene of each value of `config.scene`; everything after that is the same for all.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from simrl.evaluation.results.files import RESULTS_FOLDER
from simrl.experiments import banner, memory, plan, results
from simrl.experiments.concierge import ConciergeScene
from simrl.experiments.concierge_settings import ConciergeSettings
from simrl.experiments.forecast_results import forecast_table
from simrl.experiments.pretrained import PretrainedScene
from simrl.experiments.pretrained_settings import PretrainedSettings
from simrl.experiments.scene import Scene
from simrl.experiments.settings import MAX_WORKERS, ExperimentSettings
from simrl.run import config as config_lib
from simrl.run import directory, processes, runtime, stage_files, stages, workers
from simrl.run.config import ConfigError
from simrl.run.stages import Stage

SCENES: Mapping[str, tuple[type[ExperimentSettings], Any]] = {
    'concierge': (ConciergeSettings, ConciergeScene),
    'pretrained': (PretrainedSettings, PretrainedScene),
}
FIXED = ('scene',)  # fields of the config that a run directory keeps


def settings_of(config: ml_collections.ConfigDict | Mapping[str, Any]) -> ExperimentSettings:
    """The settings of the scene that `config.scene` names.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type or impossible.
    """
    name = str(config.get('scene'))
    if name not in SCENES:
        raise ConfigError(f'config.scene: expected one of {", ".join(SCENES)}, found {name!r}')
    return config_lib.from_config_dict(SCENES[name][0], config, 'config')


def scene_of(settings: ExperimentSettings, workdir: pathlib.Path) -> Scene:
    """The scene of these settings."""
    scene: Scene = SCENES[settings.scene][1](settings, workdir)
    return scene


def build_stages(settings: ExperimentSettings, workdir: pathlib.Path) -> list[Stage]:
    """All stages of an experiment, each after those that it reads. Loads no model."""
    return plan.plan(scene_of(settings, workdir))


@runtime.numeric_defaults()
def run(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    workdir: pathlib.Path | str,
    *,
    rerun: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    show_plan: bool = False,
) -> None:
    """Runs what is missing of an experiment, and writes its results once all stages are done.

    Args:
        config: the settings; `scene` names the dataclass that they fill in.
        workdir: the run directory, a local one; `~` is expanded.
        rerun: names of stages, or of folders of stages, to be cleared first with all that depend on them.
        only: names of stages, or of folders of stages, to run with what they need; empty: all.
        show_plan: print the stages with their state instead; nothing is written and no model loaded.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type or impossible, or JAX does not find its devices.
        WorkdirError: `workdir` is of another config, or something else.
    """
    try:
        workdir = config_lib.local_path(workdir)
    except ValueError as error:
        why = '. Buckets have neither the locks of a run directory nor files that grow'
        raise ConfigError(f'workdir: {error}{why if config_lib.URL.match(str(workdir)) else ""}') from error
    if processes.leads():
        print(f'workdir: {workdir}', flush=True)
    settings = settings_of(config)
    plain = config_lib.to_dict(settings)
    if processes.count() > 1:
        command = {'workdir': str(workdir), 'rerun': list(rerun), 'only': list(only), 'plan': show_plan}
        processes.check_alike('the command', {**runtime.versions(), **command, 'config': plain})
    runtime.start_backend()
    if processes.count() > 1:
        processes.check_alike('the devices', {'of each process': jax.local_device_count()})
    scene = scene_of(settings, workdir)
    everything, off = plan.plan(scene), plan.measures_off(settings.evaluation)
    for flag, name in (*(('--only', name) for name in only), *(('--rerun', name) for name in rerun)):
        if setting := off.get(name.strip('/').partition('/')[0]):
            raise ConfigError(f'{flag}={name}: this measure is off and has no stages; {setting} switches it on')
    again = stages.stages_to_rerun(workdir, everything, rerun)
    selected = stages.select(workdir, everything, only) if only else everything
    num_workers = workers_of(settings)
    if show_plan:
        if not processes.leads():
            return
        planned = directory.plan_of(workdir, plain, selected, fixed=FIXED, rerun=again)
        print(directory.plan_text(planned), flush=True)
        directory.check_settings(workdir, selected, again)
        if refused := {stage.reason: stage.name for stage in planned if stage.state == 'refused'}:
            raise ConfigError('; '.join(refused))
        return
    runtime.enable_compilation_cache()
    directory.open_workdir(workdir, plain, memory.checked(scene, selected), fixed=FIXED, rerun=again)
    if processes.leads():
        print(banner.banner(scene), flush=True)
    names = [stage.name for stage in selected]
    if num_workers == 1:
        with workers.own_output(workdir):
            stages.run_stages(workdir, selected)
    else:
        workers.run_side_by_side(build_stages, settings, workdir, names, num_workers)
    if not processes.leads():
        return
    if only:
        forecast = plan.forecast_spec(scene)
        if forecast is not None and (table := forecast_table(forecast, workdir, names)):
            print(f'\n{table}\n{forecast.words}\n')
        print('done; the command without --only writes the results once all stages are done', flush=True)
        return
    for folder, setting in off.items():
        if any(stage_files.is_done(path.parent) for path in (workdir / folder).rglob(stage_files.STAGE_FILE)):
            print(f'{folder}/...: done in this run, but not in the results: {setting} is not set', flush=True)
    with stage_files.wait_for_lock(workdir / RESULTS_FOLDER):  # jobs of other arms may end at the same time
        results.write_results(results_spec(scene), workdir)


def workers_of(settings: ExperimentSettings) -> int:
    """Number of stages that run side by side: one on an accelerator, whose memory the first worker would take.

    Raises:
        ConfigError: more workers than CPUs; or than one on an accelerator, or in a run of several processes.
    """
    backend = jax.default_backend()
    if processes.count() > 1:
        if (settings.workers or 1) > 1:
            raise ConfigError(
                f'config.workers: expected 1 in a run of {processes.count()} processes, which run each stage together, '
                f'found {settings.workers}'
            )
        return 1
    if settings.workers is None:
        return min(MAX_WORKERS, len(workers.cpus())) if backend == 'cpu' else 1
    workers.cpu_shares(settings.workers)
    if settings.workers > 1 and backend != 'cpu':
        raise ConfigError(
            f'config.workers: expected 1 on {backend}, whose memory the first worker would take, found '
            f'{settings.workers}. With several devices, start the command once for each, with that one visible'
        )
    return settings.workers


def results_spec(scene: Scene) -> results.ResultsSpec:
    """Stages that the results are made of, and the seconds of those that are done."""
    settings = scene.settings
    blocks = range(len(settings.evaluation.blocks()))
    assistants, replayed = plan.assistants(scene), plan.replayed_simulators(scene)
    return results.ResultsSpec(
        arms={
            arm: results.Arm(
                scene.arm_kind(arm),
                oracle=scene.is_people(arm),
                parameters=None if (model := scene.simulator_model(arm)) is None else banner.num_parameters(model),
                held_out=arm in settings.held_out_simulators,
            )
            for arm in settings.arms
        },
        assistants={
            f'{arm}/seed-{seed}': results.AssistantSpec(arm, seed, plan.rl_stage(arm, seed))
            for arm, seed in plan.runs(scene)
        },
        measures={
            name: results.MeasureSpec(
                words=measure.words,
                stages={
                    assistant: [plan.measure_stage(name, assistant, block) for block in blocks]
                    for assistant in assistants
                },
                prefer=measure.prefer,
            )
            for name, measure in scene.measures().items()
        },
        simulators={
            name: results.SimulatorSpec(
                arm,
                plan.likelihood_stage(name),
                plan.replay_stage(name) if name in replayed else None,
            )
            for name, (arm, _) in plan.simulators(scene).items()
        },
        matrix=results.MatrixSpec(
            score=scene.reward_name,
            stages={
                name: {
                    simulator: plan.matrix_stage(name, simulator)
                    for simulator in plan.simulators_met(scene, assistant.seed)
                }
                for name, assistant in assistants.items()
            },
            people=scene.people_measure,
            times=scene.reward_times,
        ),
        rates=scene.rates,
        caution=scene.caution,
        forecast=plan.forecast_spec(scene),
        seconds={
            stage.name: stages.stage_seconds(scene.workdir / stage.name)
            for stage in plan.plan(scene)
            if stage_files.is_done(scene.workdir / stage.name)
        },
        annotators=settings.evaluation.annotators,
    )
