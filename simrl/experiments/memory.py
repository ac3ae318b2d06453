"""Memory that an RL step needs of each device, by kind, from the config alone; refused where it cannot be there.

`step_memory` counts, before anything is loaded:

1. What a step keeps from its start to its end: trained parameters, optimizer, reference, reward model or judge,
   simulator. It is exact.
2. What it has for a while, in one of two moments: to sample, a copy of the parameters in the sampler's dtype and the
   caches; to update, gradients and what they keep of the forward pass. Both copies are exact. Caches and activations
   are those of the longest conversations that there may be, which need not come; the latter within a factor of two.

Of fine-tuning and reward models it is the first part, and gradients. Not counted are a simulator of the user's own, and
what is there only before the first step. `checked` refuses a training whose exact part is more than a device has, and
prints a warning where only the rest is.
"""

import dataclasses
import functools
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from simrl.experiments import plan
from simrl.experiments.pretrained_rewards import HELD_OUT_STAGE, REWARD_STAGE
from simrl.experiments.pretrained_settings import PretrainedSettings, PretrainedSimulator
from simrl.experiments.pretrained_simulators import fine_tuned_here, sft_stage
from simrl.experiments.scene import Scene
from simrl.experiments.settings import Compute
from simrl.models import attention, lora, placement, sharding
from simrl.models.abstract import ITEM_BYTES, activation_bytes, cache_bytes, device_bytes, params_of, placed
from simrl.models.lora import LoRASettings
from simrl.models.rows import bucket_widths
from simrl.models.transformer import Params, TransformerConfig
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import PIECES_AT_ONCE, Limits
from simrl.rollouts.collect import rows_at_once
from simrl.rollouts.schedule import levels
from simrl.run import memory, processes
from simrl.run.config import ConfigError
from simrl.run.stages import Stage
from simrl.training.optimizer import Optimizer, TrainState, init_state, make_optimizer
from simrl.training.sft import SFTSettings
from simrl.training.supervised import FitSettings

GIB = 2**30
NEAR = 0.9  # of a device, which an estimate may take without a warning
WHOLE_EMBEDDINGS = 3  # float32, that a device has at once where rows are split, as compiled for TPUs
SAMPLING, GRADIENTS = 'parameters to sample', 'gradients'
MESH, SIMULATOR_MESH = 'config.compute.mesh', 'config.compute.simulator_mesh'
MORE = {  # devices of a mesh
    MESH: f'({MESH}: data parameters, optimizer, gradients and reference, model all), and adapters (lora) leave little '
    'to train',
    SIMULATOR_MESH: f'({SIMULATOR_MESH}.model)',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """The arrays of an RL update that outlive a step, abstract.

    Attributes:
        state: of the trained parameters.
        shardings: of the state.
        frozen: the frozen decoder with its adapters' scale; `{}` without LoRA.
        reference: None without one. With LoRA it is `frozen`.
    """

    state: TrainState
    shardings: TrainState
    frozen: Params
    reference: Params | None


@dataclasses.dataclass(frozen=True)
class Other:
    """A model beside the trained one.

    Attributes:
        kind: what it is called.
        dtype: of its decoder while it is kept.
        heads: names of its heads.
    """

    kind: str
    config: TransformerConfig
    dtype: str
    heads: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of one device in an RL step, by kind.

    Attributes:
        kept: from the start of the step to its end.
        sampling, updating: beside it, in one moment and in the other.
        devices: that need as much.
        mesh: the setting that lays them out.
    """

    kept: Mapping[str, int]
    sampling: Mapping[str, int]
    updating: Mapping[str, int]
    devices: int = 1
    mesh: str = MESH

    @property
    def least(self) -> Mapping[str, int]:
        """Kinds that are there at once in every run."""
        copies = {SAMPLING: self.sampling.get(SAMPLING, 0), GRADIENTS: self.updating.get(GRADIENTS, 0)}
        largest = max(copies, key=lambda kind: copies[kind])
        return {**self.kept, largest: copies[largest]}

    @property
    def most(self) -> Mapping[str, int]:
        """Kinds that are there at once where conversations are as long as they may be."""
        updates = sum(self.updating.values()) > sum(self.sampling.values())
        return {**self.kept, **(self.updating if updates else self.sampling)}


def training_of(
    config: TransformerConfig, settings: RLSettings, dtype: str, mesh: Mesh, optimizer: Optimizer
) -> Training:
    """The training state of an arm, as `rl.train` places it.

    Args:
        dtype: compute dtype of training, in which the reference is kept.
    """
    heads = ('value_head',) if settings.algorithm.advantage == 'gae' else ()
    training = _training(config, settings.lora, heads, dtype, mesh, optimizer)
    if settings.algorithm.kl == 'none':
        return training
    reference = training.frozen or params_of(config, mesh, sharding.TRAINING_RULES, dtype=dtype)
    return dataclasses.replace(training, reference=reference)


def _training(
    config: TransformerConfig,
    adapted: LoRASettings | None,
    heads: tuple[str, ...],
    dtype: str,
    mesh: Mesh,
    optimizer: Optimizer,
) -> Training:
    """Any training's state, without a reference."""
    decoder, rules = params_of(config, mesh, sharding.TRAINING_RULES, heads=heads), sharding.TRAINING_RULES
    trained, frozen = decoder, dict[str, Any]()
    if adapted is not None:
        shapes = {'adapters': jax.eval_shape(lambda: lora.init(jax.random.key(0), config, adapted))}
        trained = placed(shapes, placement.shardings_of(shapes, config, mesh, rules)) | {x: decoder[x] for x in heads}
        scale = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        frozen = params_of(config, mesh, rules, dtype=dtype)
        frozen |= {'adapter_scale': jax.ShapeDtypeStruct((), 'float32', sharding=scale)}
    abstract = jax.eval_shape(lambda params: init_state(params, optimizer), trained)
    state_shardings = sharding.state_shardings(abstract, trained, placement.shardings_of(trained, config, mesh, rules))
    return Training(placed(abstract, state_shardings), state_shardings, frozen, None)


def kept_kinds(training: Training, others: Sequence[Other], mesh: Mesh) -> dict[str, int]:
    """Bytes a device of what an RL step keeps from its start to its end, by kind."""
    kinds = {
        'parameters': device_bytes(training.state.params),
        'optimizer': device_bytes(training.state.opt_state),
    }
    if training.frozen:
        kinds['frozen'] = device_bytes(training.frozen)
    elif training.reference is not None:
        kinds['reference'] = device_bytes(training.reference)
    return kinds | other_kinds(others, mesh)


def other_kinds(others: Sequence[Other], mesh: Mesh) -> dict[str, int]:
    """Bytes a device of models that are not trained, by kind."""
    kinds: dict[str, int] = {}
    for other in others:
        params = params_of(other.config, mesh, sharding.SAMPLING_RULES, heads=other.heads, dtype=other.dtype)
        kinds[other.kind] = kinds.get(other.kind, 0) + device_bytes(params)
    return kinds


def step_memory(
    config: TransformerConfig,
    simulators: Sequence[Other | None],
    others: Sequence[Other],
    *,
    settings: RLSettings,
    compute: Compute,
    limits: Limits,
    mesh: Mesh,
    platform: str,
    simulator_mesh: Mesh | None = None,
) -> list[StepMemory]:
    """Bytes of a device in an RL step; where simulators have devices of their own, of those as well.

    Args:
        config: of the trained model.
        simulators: of a mixture several, which are all there while conversations are held with one after the other;
            None for one off the device, for which assistants wait in two pieces.
        others: reward model, judge.
        simulator_mesh: None: `mesh`.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps * settings.algorithm.updates_per_batch)
    training = training_of(config, settings, compute.training.dtype, mesh, optimizer)
    data, model = mesh.shape['data'], mesh.shape['model']
    rows = settings.prompts_per_step * settings.samples_per_prompt
    at_once, dtype = rows_at_once(rows, compute.rows_in_flight), compute.sampling.dtype
    tokens = limits.prompt_tokens + limits.turns * (limits.assistant_tokens + limits.user_tokens)

    sides, continuous = 1 + (None not in simulators), compute.batching == 'continuous' or simulator_mesh is not None

    def cache(of: TransformerConfig, dtype: str, mesh: Mesh) -> int:
        shards = mesh.shape['data']
        entering = shards * levels(at_once, shards, sides)[0].entering if continuous else 0
        return cache_bytes(of, dtype, rows=at_once + entering, tokens=tokens, mesh=mesh)

    pieces = min(PIECES_AT_ONCE, rows // at_once) if None in simulators else 1
    sampling = {
        SAMPLING: device_bytes(params_of(config, mesh, sharding.SAMPLING_RULES, dtype=dtype)),
        "the assistant's cache": pieces * cache(config, dtype, mesh),
    }
    execution, microbatch = compute.training, settings.algorithm.rows_per_microbatch(rows)
    row_tokens = bucket_widths(settings.row_buckets, tokens)[-1]
    query: Any = jax.ShapeDtypeStruct((1, row_tokens, config.num_heads, config.head_dim), execution.dtype)
    updating = {
        GRADIENTS: device_bytes(training.state.params),
        'activations': activation_bytes(
            config,
            rows=-(-microbatch // data),
            tokens=row_tokens,
            item=ITEM_BYTES[execution.dtype],
            remat=execution.remat,
            scores=attention.choose(execution.attention, platform, query) == 'xla',
            logits=execution.log_prob_chunk,
            model=model,
        ),
    }
    if data > 1:
        whole = 4 * config.padded_vocab_size * config.model_dim
        updating["the embedding's gradient"] = WHOLE_EMBEDDINGS * whole // model
    own = StepMemory(kept_kinds(training, others, mesh), sampling, updating, mesh.size)
    theirs, here = mesh if simulator_mesh is None else simulator_mesh, [one for one in simulators if one is not None]
    if not here:
        return [own]
    heard = {"the simulator's cache": max(cache(one.config, one.dtype, theirs) for one in here)}
    partner = StepMemory(other_kinds(here, theirs), heard, {}, theirs.size, SIMULATOR_MESH)
    if simulator_mesh is not None and set(mesh.devices.flat).isdisjoint(simulator_mesh.devices.flat):
        return [own, partner]
    return [dataclasses.replace(own, kept={**own.kept, **partner.kept}, sampling={**sampling, **heard})]


def arm_memory(scene: Scene, arm: str) -> list[StepMemory]:
    """Bytes of a device in an RL step of an arm, for each mesh; see `step_memory`."""
    compute, mesh = scene.compute, scene.compute.mesh.make()
    return step_memory(
        scene.model_configs()['assistant'],
        list(_simulators(scene, arm)),
        list(_rewards(scene)),
        settings=scene.settings.rl,
        compute=compute,
        limits=scene.limits,
        mesh=mesh,
        platform=mesh.devices.flat[0].platform,
        simulator_mesh=compute.mesh_of_simulators(),
    )


def _simulators(scene: Scene, arm: str) -> Iterator[Other | None]:
    """The simulator of an arm, or those of its mixture; None for one off the device, or of the user's own."""
    own = scene.settings.arms[arm]
    if isinstance(own, PretrainedSimulator) and own.mixture:
        for member in own.mixture:
            yield from _simulators(scene, member)
        return
    config = scene.simulator_model(arm)
    dtype = (own.dtype if isinstance(own, PretrainedSimulator) else None) or scene.compute.sampling.dtype
    yield None if config is None else Other('simulator', config, dtype)


def _rewards(scene: Scene) -> Iterator[Other]:
    """The models of an RL step that give the reward."""
    compute, models, settings = scene.compute, scene.model_configs(), scene.settings
    if isinstance(settings, PretrainedSettings) and settings.reward.by == 'reward_model':
        yield Other('reward model', models['assistant'], compute.training.dtype, ('reward_head',))
    if 'judge' in models:
        yield Other('judge', models['judge'], compute.sampling.dtype)


def fit_memory(
    config: TransformerConfig, settings: FitSettings, compute: Compute, heads: tuple[str, ...] = ()
) -> list[StepMemory]:
    """Bytes of a device in a step of fine-tuning or of a reward model; without activations."""
    adapted, mesh = settings.lora if isinstance(settings, SFTSettings) else None, compute.mesh.make()
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    training = _training(config, adapted, heads, compute.training.dtype, mesh, optimizer)
    gradients = {GRADIENTS: device_bytes(training.state.params)}
    return [StepMemory(kept_kinds(training, (), mesh), {}, gradients, mesh.size)]


def _fits(scene: Scene) -> Iterator[tuple[str, str, Callable[[], list[StepMemory]]]]:
    """The stages that fit pretrained models: a stage's name, what errors call it, its memory."""
    s = scene.settings
    if not isinstance(s, PretrainedSettings):
        return
    compute, models = scene.compute, scene.model_configs()
    for arm, own in s.arms.items():
        config = scene.simulator_model(arm)
        if fine_tuned_here(own) and config is not None:
            fit = functools.partial(fit_memory, config, s.user_sft.sft, compute)
            yield sft_stage(arm), f'config.user_sft of config.arms.{arm}', fit
    for stage, field in ((REWARD_STAGE, 'reward_model'), (HELD_OUT_STAGE, 'held_out_reward_model')):
        preference, heads = getattr(s, field).preference, ('reward_head',)
        yield stage, f'config.{field}', functools.partial(fit_memory, models['assistant'], preference, compute, heads)


def checked(scene: Scene, stages: Sequence[Stage]) -> list[Stage]:
    """The stages, of which trainings check that their devices have room, after their own check."""
    needs = {stage: (field, memory_of) for stage, field, memory_of in _fits(scene)}
    for arm, seed in plan.runs(scene):
        needs[plan.rl_stage(arm, seed)] = (f'config.arms.{arm}', functools.partial(arm_memory, scene, arm))
    done = set[str]()  # seeds of an arm need the same

    def check(stage: Stage) -> None:
        stage.check()
        field, memory_of = needs[stage.name]
        if field not in done:
            check_fits(field, memory_of())
            done.add(field)

    return [
        dataclasses.replace(stage, check=functools.partial(check, stage)) if stage.name in needs else stage
        for stage in stages
    ]


def check_fits(field: str, needed: Sequence[StepMemory]) -> None:
    """Refuses a training that cannot fit; all processes call it. Process 0 prints if it may come not to fit.

    Args:
        needed: of each mesh; no two have a device in common.

    Raises:
        ConfigError: what a step keeps is more than a device has; in every process.
    """
    beside = processes.gather('the hosts', socket.gethostname()).count(socket.gethostname())  # processes of this host
    used = sum(one.devices for one in needed) // processes.count() * beside
    found = processes.gather('the memory of the devices', memory.device_limit(max(1, used)))
    limit = None if None in found else min(found)
    if limit is None:
        warnings = [f'{field}: the memory of the devices is unknown']
    else:
        for one in needed:
            if fault := refusal(field, one, limit):
                raise ConfigError(fault)
        warnings = [caution(field, one, limit) for one in needed]
    for warning in filter(None, warnings):
        if processes.leads():
            print(f'warning: {warning}', flush=True)


def refusal(field: str, needed: StepMemory, limit: int) -> str:
    """Says that a step cannot fit; '' if it can."""
    least = sum(needed.least.values())
    if least <= limit:
        return ''
    return (
        f'{field}: expected a step of its training to keep at most the {limit / GIB:.1f} GiB of a device, found '
        f'{least / GIB:.1f}: {kinds_text(needed.least)}. More devices split it {MORE[needed.mesh]}'
    )


def caution(field: str, needed: StepMemory, limit: int) -> str:
    """Says that a step may come not to fit; '' if it does."""
    most = sum(needed.most.values())
    if most <= NEAR * limit:
        return ''
    fewer = (
        "config.rl.algorithm.microbatches and config.compute.training.remat='full' keep less at once"
        if GRADIENTS in needed.most
        else 'config.compute.rows_in_flight has fewer conversations at once'
    )
    return (
        f'{field}: with conversations as long as they may be, a step takes an estimated {most / GIB:.1f} of the '
        f'{limit / GIB:.1f} GiB of a device: {kinds_text(needed.most)}; {fewer}'
    )


def kinds_text(kinds: Mapping[str, int]) -> str:
    """'parameters 1.4, optimizer 2.9 GiB', without what is nearly nothing."""
    whole = sum(kinds.values())
    unit, name = (GIB, 'GiB') if whole >= GIB else (2**20, 'MiB')
    shown = {kind: size for kind, size in kinds.items() if size >= 0.01 * whole}
    return f'{", ".join(f"{kind} {size / unit:.1f}" for kind, size in shown.items())} {name}'
