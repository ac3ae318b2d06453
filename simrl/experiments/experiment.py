"""The main job: train one assistant per simulator, all else equal, and compare the assistants.

`experiment_tasks` reads as the experiment does:
1. A user simulator is fine-tuned on people's turns, and two reward models are trained on disjoint choices of people.
2. The initial assistant's replies give the reward its zero and unit.
3. For each arm and seed an assistant is RL-trained against that arm's simulator.
4. All assistants answer the same held-out people; the second reward model compares them with the initial one.

Each step is a stage of the run directory (`stages.py`): the same command runs what is missing. `JOBS` also holds the
jobs that are one such stage.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from simrl.evaluation.results import RESULTS_FOLDER
from simrl.experiments import arms, checks, jobs, known_answer, known_answer_results, sources
from simrl.experiments.arms import ArmStages, ReplySettings, Talking
from simrl.experiments.jobs import RESULT_FILE, Compute, RewardModelSettings, UserSFTSettings
from simrl.experiments.known_answer import KnownAnswer
from simrl.experiments.sources import Data, DataSettings, Model, ModelSettings
from simrl.rl.train import RLSettings
from simrl.run import config as config_lib
from simrl.run import stage_files, stages, workers
from simrl.run.runtime import enable_compilation_cache
from simrl.run.stages import Stage

USER_STAGE, REWARD_STAGE, JUDGE_STAGE = 'sft/user', 'reward_model/train', 'reward_model/judge'
SCALE_STAGE = 'reward_model/scale'
# What changes no result beyond rounding, or says where things are (their contents are hashed), or only adds stages.
EXEMPT = (
    'arms',
    'seeds',
    'compute.loop',
    'compute.mesh',
    'compute.xla_flags',
    *(
        f'compute.{side}.{field}'
        for side in ('training', 'sampling')
        for field in ('remat', 'attention', 'log_prob_chunk')
    ),
    'data.folder',
    'model.source',  # a hub's is in the stages' slices
    'simulator_stage',
    'reward_stage',
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The whole experiment on one pretrained model."""

    model: ModelSettings
    data: DataSettings
    user_sft: UserSFTSettings
    reward_model: RewardModelSettings
    judge: RewardModelSettings
    talking: Talking
    scale: ReplySettings  # training openings; the initial assistant's replies to them give the reward its zero and unit
    arms: tuple[str, ...]  # simulators to train against, of `arms.SIMULATORS`
    seeds: tuple[int, ...]  # training seeds, the same for every arm
    rl: RLSettings
    comparison: ReplySettings  # held-out openings that every assistant answers
    compute: Compute

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_simulator('Experiment.arms', arm)
        for field in ('arms', 'seeds'):
            values = getattr(self, field)
            if not values or len(set(values)) != len(values):
                raise ValueError(f'Experiment.{field}: expected different values, at least one, found {values}')
        if self.reward_model.half == 'both' or self.judge.half == 'both' or self.reward_model.half == self.judge.half:
            raise ValueError(
                f'Experiment.judge.half: expected the half that reward_model.half={self.reward_model.half} is not, '
                f'found {self.judge.half}'
            )
        if self.rl.trained != 'assistant':
            raise ValueError(f"Experiment.rl.trained: expected 'assistant', found {self.rl.trained!r}")


@dataclasses.dataclass(frozen=True)
class SFTJob:
    """Fine-tuning of a user simulator, alone."""

    model: ModelSettings
    data: DataSettings
    user_sft: UserSFTSettings
    compute: Compute


@dataclasses.dataclass(frozen=True)
class RewardModelJob:
    """A reward model, alone."""

    model: ModelSettings
    data: DataSettings
    reward_model: RewardModelSettings
    compute: Compute


@dataclasses.dataclass(frozen=True)
class RLJob:
    """RL of one side against the other, with what other runs trained."""

    model: ModelSettings
    data: DataSettings
    simulator: str  # of `arms.SIMULATORS`
    simulator_stage: pathlib.Path | None  # the stage folder of a fine-tuned simulator; None: the model itself
    reward_stage: pathlib.Path  # the stage folder of a reward model
    talking: Talking
    scale: ReplySettings
    rl: RLSettings
    seed: int
    compute: Compute

    def __post_init__(self) -> None:
        check_simulator('RLJob.simulator', self.simulator)
        if (self.simulator == 'fine_tuned') != (self.simulator_stage is not None):
            raise ValueError(
                f"RLJob.simulator_stage: expected the folder of a stage exactly for 'fine_tuned', found "
                f'{self.simulator_stage} for {self.simulator!r}'
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """What `config.job` names.

    Attributes:
        settings: the dataclass of the job's config.
        tasks: (settings, run directory) -> the stages, each after those that it reads; importable by name.
        finish: (settings, run directory), called when all stages are done, by one process at a time.
        workers: settings -> how many stages run side by side. None: one, and it is an error if another process works in
            the run directory.
        exempt: dotted fields that may change in a run that is resumed; see `stages.open_workdir`.
    """

    settings: type[Any]
    tasks: Callable[[Any, pathlib.Path], list[Stage]]
    finish: Callable[[Any, pathlib.Path], None] | None = None
    workers: Callable[[Any], int] | None = None
    exempt: tuple[str, ...] = ()


def check_simulator(field: str, name: str) -> None:
    if name not in arms.SIMULATORS:
        raise ValueError(f'{field}: unknown simulator {name!r}, expected one of {", ".join(arms.SIMULATORS)}')


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, *, rerun: tuple[str, ...] = ()) -> None:
    """Runs the job that `config.job` names in `workdir`, or what is missing of it.

    Args:
        config: the job's name and its settings.
        workdir: the run directory.
        rerun: names of stages, or of folders of stages, to be cleared first with all that rest on them.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type or impossible.
        WorkdirError: `workdir` is of another config, or something else.
    """
    fields = dict(config)
    name = fields.pop('job', None)
    if name not in JOBS:
        raise config_lib.ConfigError(f'config.job: expected one of {", ".join(JOBS)}, found {name!r}')
    job = JOBS[name]
    enable_compilation_cache()
    settings: Any = config_lib.from_config_dict(job.settings, fields, 'config')
    num_workers = _num_workers(job, settings)
    tasks = job.tasks(settings, workdir)  # with what can be refused before anything is written
    again = stages.stages_to_rerun(workdir, tasks, rerun)
    plain = {'job': name, **config_lib.to_dict(settings)}
    stages.open_workdir(workdir, plain, tasks, exempt=job.exempt, rerun=again)
    if num_workers == 1:
        stages.run_stages(workdir, tasks, if_locked='raise' if job.workers is None else 'wait')
    else:
        workers.run_side_by_side(job.tasks, settings, workdir, [stage.name for stage in tasks], num_workers)
    if job.finish is not None:
        with stage_files.wait_for_lock(workdir / RESULTS_FOLDER):  # jobs of other arms may end here at the same time
            job.finish(settings, workdir)


def _num_workers(job: Job, settings: Any) -> int:
    """How many stages run side by side. Refuses more workers than CPUs, or than one on an accelerator."""
    number = 1 if job.workers is None else job.workers(settings)
    workers.cpu_shares(number)
    if number > 1 and jax.default_backend() != 'cpu':
        raise config_lib.ConfigError(
            f'config.workers: expected 1 on {jax.default_backend()}, whose memory the first worker would take, found '
            f'{number}. Where there are several devices, start the command once for each, with that one visible'
        )
    return number


def _common(settings: 'Experiment | SFTJob | RewardModelJob | RLJob') -> dict[str, Any]:
    """What every stage's results depend on: the model, and in what precision it is computed."""
    compute = settings.compute
    return {
        'model': jobs.model_slice(settings.model),
        'dtypes': {'training': compute.training.dtype, 'sampling': compute.sampling.dtype},
    }


def _load(settings: 'Experiment | SFTJob | RewardModelJob | RLJob') -> tuple[Model, Data]:
    checks.check_xla_flags(settings.compute)
    try:
        return sources.load(settings.model, settings.compute.mesh.make()), sources.read(settings.data)
    except ValueError as error:
        raise config_lib.ConfigError(f'config.model, config.data: {error}') from error


def _check_rl(settings: Experiment | RLJob, simulators: tuple[str, ...], model: Model, data: Data) -> None:
    """Refuses what RL and the scale of its reward could not do; a scale needs two replies to differ."""
    talking, compute = settings.talking, settings.compute
    openings = checks.count_openings(data.conversations_of('train'), model, talking, compute)
    checks.check_rl(settings.rl, simulators, openings, model, talking, compute)
    checks.check_replies('config.scale', settings.scale, openings, compute, at_least=2)


def _files(model: ModelSettings, data: DataSettings) -> dict[str, pathlib.Path]:
    """The inputs of a stage that are files: a hub model is named in the slice, not hashed."""
    files = {'conversations': data.folder / data.conversations, 'preferences': data.folder / data.preferences}
    source = jobs.local_source(model)
    return files | ({} if source is None else {'model': source})


def experiment_tasks(settings: Experiment, workdir: pathlib.Path) -> list[Stage]:
    """The whole experiment; see the module's docstring."""
    model, data = _load(settings)
    talking, compute = settings.talking, settings.compute
    checks.check_user_sft('config.user_sft', settings.user_sft, model, data, compute)
    checks.check_reward_model('config.reward_model', settings.reward_model, model, data, compute)
    checks.check_reward_model('config.judge', settings.judge, model, data, compute)
    _check_rl(settings, settings.arms, model, data)
    held_out = checks.count_openings(data.conversations_of('test'), model, talking, compute)
    checks.check_replies('config.comparison', settings.comparison, held_out, compute)
    reward_model, scale, judge = workdir / REWARD_STAGE, workdir / SCALE_STAGE, workdir / JUDGE_STAGE

    tasks = [
        _user_task(settings, model, data),
        _reward_task(REWARD_STAGE, settings, settings.reward_model, model, data),
        _reward_task(JUDGE_STAGE, settings, settings.judge, model, data),
        _scale_task(settings, reward_model, model, data),
    ]
    trained: dict[str, pathlib.Path | None] = {}
    for seed in settings.seeds:
        for arm in settings.arms:
            simulator = workdir / USER_STAGE if arm == 'fine_tuned' else None
            read = ArmStages(reward_model, scale, simulator)
            tasks.append(_rl_task(settings, arm, seed, read, model, data))
            trained[rl_stage(arm, seed)] = workdir / rl_stage(arm, seed)
    for assistant, stage in {'initial': None, **trained}.items():
        tasks.append(_evaluate_task(settings, assistant, stage, judge, model, data))
    return tasks


def finish_experiment(settings: Experiment, workdir: pathlib.Path) -> None:
    """Compares the assistants, and prints and stores what came out."""
    trained = [rl_stage(arm, seed) for seed in settings.seeds for arm in settings.arms]
    comparison = config_lib.to_dict(arms.compare(workdir, trained))
    stage_files.write_json(workdir / RESULTS_FOLDER / 'comparison.json', comparison)
    print(report(workdir, comparison))


def _user_task(settings: Experiment | SFTJob, model: Model, data: Data) -> Stage:
    return Stage(
        USER_STAGE,
        _common(settings) | {'user_sft': settings.user_sft},
        _files(settings.model, settings.data),
        lambda folder: jobs.fine_tune_user(folder, model, data, settings.user_sft, settings.compute),
    )


def _reward_task(
    name: str, settings: Experiment | RewardModelJob, reward_model: RewardModelSettings, model: Model, data: Data
) -> Stage:
    return Stage(
        name,
        _common(settings) | {'reward_model': reward_model},
        _files(settings.model, settings.data),
        lambda folder: jobs.fit_reward_model(folder, model, data, reward_model, settings.compute),
    )


def _scale_task(settings: Experiment | RLJob, reward_stage: pathlib.Path, model: Model, data: Data) -> Stage:
    return Stage(
        SCALE_STAGE,
        _common(settings) | {'talking': settings.talking, 'scale': settings.scale},
        {**_files(settings.model, settings.data), 'reward_model': reward_stage},
        lambda folder: arms.measure_scale(
            folder, model, data, reward_stage, settings.talking, settings.scale, settings.compute
        ),
    )


def _rl_task(
    settings: Experiment | RLJob, simulator: str, seed: int, read: ArmStages, model: Model, data: Data
) -> Stage:
    inputs = {**_files(settings.model, settings.data), 'reward_model': read.reward_model, 'scale': read.scale}
    if read.simulator is not None:
        inputs['simulator'] = read.simulator
    return Stage(
        rl_stage(simulator, seed),
        _common(settings)
        | {'talking': settings.talking, 'simulator': simulator, 'seed': seed, 'rl': settings.rl}
        | {'log_every': settings.compute.loop.log_every},  # which steps the first and last reward are of
        inputs,
        lambda folder: arms.train_arm(
            folder, model, data, simulator, seed, read, settings.talking, settings.rl, settings.compute
        ),
    )


def _evaluate_task(
    settings: Experiment,
    assistant: str,
    stage: pathlib.Path | None,
    judge: pathlib.Path,
    model: Model,
    data: Data,
) -> Stage:
    inputs = {**_files(settings.model, settings.data), 'judge': judge}
    if stage is not None:
        inputs['assistant'] = stage
    return Stage(
        f'evaluate/{assistant}',
        _common(settings) | {'talking': settings.talking, 'comparison': settings.comparison},
        inputs,
        lambda folder: arms.evaluate(
            folder, model, data, judge, stage, settings.talking, settings.comparison, settings.compute
        ),
    )


def rl_stage(arm: str, seed: int) -> str:
    return f'rl/{arm}/seed-{seed}'


def report(workdir: pathlib.Path, comparison: Mapping[str, Any]) -> str:
    """What came out, as text."""

    def result(name: str) -> Any:
        return json.loads((workdir / name / RESULT_FILE).read_text())

    def estimate(x: Mapping[str, Any]) -> str:
        return f'{x["mean"]:.3f} [{x["low"]:.3f}, {x["high"]:.3f}]'

    user = result(USER_STAGE)
    lines = [
        '',
        f'simulator fine-tuning: held-out loss on human turns {user["held_out_loss_before"]:.3f} -> '
        f'{user["held_out_loss_after"]:.3f} nats per token ({user["held_out_rows"]} conversations); without '
        f'ends {user["held_out_content_loss_before"]:.3f} -> {user["held_out_content_loss_after"]:.3f}',
    ]
    for name in (REWARD_STAGE, JUDGE_STAGE):
        r = result(name)
        lines.append(
            f'{name}: accuracy {estimate(r["accuracy"])}, "longer wins" {estimate(r["longer_wins"])} on '
            f'{r["accuracy"]["num_observations"]} held-out pairs of {r["accuracy"]["num_clusters"]} openings'
        )
    lines += [
        '',
        f'{"assistant":<26}{"reward first -> last":>22}{"ends by signal":>16}{"judge score":>13}  win rate vs initial',
    ]
    for name, row in comparison['assistants'].items():
        if name == 'initial':
            lines.append(f'{name:<26}{"":>22}{"":>16}{row["mean_score"]:>13.3f}')
        else:
            r = result(name)
            change = f'{r["reward_first"]:.3f} -> {r["reward_last"]:.3f}'
            lines.append(
                f'{name:<26}{change:>22}{r["ended_by_signal"]:>16.1%}{row["mean_score"]:>13.3f}  '
                f'{estimate(row["win_rate"])}'
            )
    lines += [
        f'on {comparison["openings"]} held-out openings; 95% intervals over openings: this checkpoint only.',
        'A small reward model compares few replies of a small model: a check of the pipeline, and no evidence about '
        'simulators.',
    ]
    return '\n'.join(lines)


def sft_tasks(settings: SFTJob, workdir: pathlib.Path) -> list[Stage]:
    model, data = _load(settings)
    checks.check_user_sft('config.user_sft', settings.user_sft, model, data, settings.compute)
    return [_user_task(settings, model, data)]


def reward_model_tasks(settings: RewardModelJob, workdir: pathlib.Path) -> list[Stage]:
    model, data = _load(settings)
    checks.check_reward_model('config.reward_model', settings.reward_model, model, data, settings.compute)
    return [_reward_task(REWARD_STAGE, settings, settings.reward_model, model, data)]


def rl_tasks(settings: RLJob, workdir: pathlib.Path) -> list[Stage]:
    model, data = _load(settings)
    _check_rl(settings, (settings.simulator,), model, data)
    read = ArmStages(settings.reward_stage, workdir / SCALE_STAGE, settings.simulator_stage)
    return [
        _scale_task(settings, read.reward_model, model, data),
        _rl_task(settings, settings.simulator, settings.seed, read, model, data),
    ]


def _job(settings: type, tasks: Callable[[Any, pathlib.Path], list[Stage]], **options: Any) -> Job:
    return Job(settings, tasks, exempt=EXEMPT, **options)


JOBS: Mapping[str, Job] = {
    'known_answer': Job(
        KnownAnswer,
        known_answer.tasks,
        known_answer_results.finish,
        known_answer.num_workers,
        # Arms, seeds, people and sizes of users can be added.
        (*EXEMPT, 'evaluation.people', 'workers', 'users'),
    ),
    'experiment': _job(Experiment, experiment_tasks, finish=finish_experiment),
    'sft_user': _job(SFTJob, sft_tasks),
    'reward_model': _job(RewardModelJob, reward_model_tasks),
    'rl': _job(RLJob, rl_tasks),
}
