"""Refuse settings that fit neither the model, nor the data, nor the devices, before anything is trained.

A dataclass checks what it can see of itself. Here is what shows only once config, tokenizer and data are there. Each
check raises a `ConfigError` that names the field; `field` is what it calls the settings that it is given, for instance
'config.user_sft'. None reads weights.
"""

import collections
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence

from simrl.conversations.records import Conversation, Preference
from simrl.conversations.views import preference_rows
from simrl.experiments.fitting import RewardModelSettings, UserSFTSettings, pairs_of, rows_of
from simrl.experiments.settings import Compute, ForecastSettings
from simrl.experiments.sources import Model, of_split
from simrl.models import sharding
from simrl.models.transformer import TransformerConfig
from simrl.rl.train import RLSettings
from simrl.rollouts.collect import rows_at_once
from simrl.run.config import ConfigError
from simrl.run.runtime import missing_xla_flags
from simrl.training.preference import PreferenceSettings
from simrl.training.sft import SFTSettings


def check_runtime(compute: Compute) -> None:
    """Refuses flags of XLA that are not in force, as where a job is called as a library, and a bucket without gcsfs."""
    bucket = compute.loop.checkpoints
    if bucket is not None and bucket.startswith('gs://') and importlib.util.find_spec('gcsfs') is None:
        raise ConfigError(f'config.compute.loop.checkpoints: expected the package gcsfs for {bucket}, found none')
    missing = missing_xla_flags(compute.xla_flags)
    if missing:
        raise ConfigError(
            f'config.compute.xla_flags: expected {" ".join(compute.xla_flags)} in force, found '
            f'{" ".join(missing)} missing. `simrl.main` sets them; where a job is called otherwise, call '
            '`runtime.use_xla_flags` first, before a backend of JAX starts'
        )


def check_split(field: str, rows: int, compute: Compute) -> None:
    """Refuses rows of a batch that the devices cannot share evenly; `field` says how many there are."""
    devices = compute.mesh.make().shape['data']
    if rows % devices:
        raise ConfigError(
            f'{field}: expected a multiple of the {devices} devices of config.compute.mesh.data, found {rows} rows; '
            f'with --config.compute.mesh.data={math.gcd(rows, devices)} they divide'
        )


def check_conversations(field: str, rows: int, compute: Compute) -> None:
    """`check_split` of conversations, whose rows the devices of simulators share as well."""
    check_split(field, rows, compute)
    mesh = compute.mesh_of_simulators()
    if mesh is not None and rows % mesh.shape['data']:
        raise ConfigError(
            f'{field}: expected a multiple of the {mesh.shape["data"]} devices of config.compute.simulator_mesh.data, '
            f'found {rows} rows'
        )


def check_mesh(models: Mapping[str, TransformerConfig], compute: Compute) -> None:
    """Refuses a mesh over which the models, by name, cannot be sharded."""
    mesh = compute.mesh.make()
    for name, config in models.items():
        try:
            sharding.param_shardings(config, mesh, sharding.TRAINING_RULES)
        except ValueError as error:
            raise ConfigError(f'config.compute.{error} ({name})') from error


def check_simulator_mesh(models: Mapping[str, TransformerConfig | None], compute: Compute) -> None:
    """Refuses a mesh of simulators over which their models, by arm, cannot be sharded; None: of no model here."""
    mesh = compute.mesh_of_simulators()
    for arm, config in models.items():
        if mesh is None or config is None:
            continue
        try:
            sharding.param_shardings(config, mesh, sharding.TRAINING_RULES)
        except ValueError as error:
            raise ConfigError(f'config.compute.simulator_{error} (config.arms.{arm})') from error


def check_row_lengths(field: str, lengths: Sequence[int], config: TransformerConfig) -> None:
    """Refuses rows that may be longer than the model's positions, or than its sliding window."""
    if lengths[-1] > config.max_row_tokens:
        raise ConfigError(f"{field}: expected at most the model's {config.row_limit} tokens, found {lengths[-1]}")


def check_fitting(
    field: str,
    settings: SFTSettings | PreferenceSettings,
    config: TransformerConfig,
    compute: Compute,
    *,
    rows_per_item: int = 1,
) -> None:
    """Refuses rows that may be too long for the model, a warm-up without end, and uneven batches.

    Args:
        config: of the model.
        rows_per_item: rows for each of a batch's `batch_size`: a pair has two.
    """
    check_row_lengths(f'{field}.batch.lengths', settings.batch.lengths, config)
    if settings.optimizer.warmup_steps >= settings.steps:
        raise ConfigError(
            f'{field}.optimizer.warmup_steps: expected fewer than steps={settings.steps}, '
            f'found {settings.optimizer.warmup_steps}'
        )
    check_split(f'{field}.batch.batch_size', settings.batch.batch_size * rows_per_item, compute)


def check_user_sft(
    field: str,
    settings: UserSFTSettings,
    model: Model,
    people: Sequence[Conversation],
    compute: Compute,
    system: Callable[[Conversation], str] | None = None,
) -> None:
    """`check_fitting`; and refuses data with nothing to train on, or nothing to measure on.

    Args:
        system: the system text of the rows; None: the template's default.
    """
    check_fitting(f'{field}.sft', settings.sft, model.config, compute)
    for split in ('train', 'test'):
        conversations = of_split(people, split)
        try:
            found = any(rows_of([conversation], settings, model, system)[0] for conversation in conversations)
        except ValueError as error:
            raise ConfigError(f'{field}.on_long: {error}') from error
        if not found:
            raise ConfigError(
                f'{field}: expected a conversation of the split {split!r} with something of the {settings.role} to '
                f'learn in it, found none among {len(conversations)}; all of the data: {_splits(people)}'
            )


def _splits(records: Sequence[Conversation | Preference]) -> str:
    """'train 12, test 6'."""
    return ', '.join(f'{split} {number}' for split, number in collections.Counter(x.split for x in records).items())


def check_reward_model(
    field: str, settings: RewardModelSettings, model: Model, preferences: Sequence[Preference], compute: Compute
) -> None:
    """`check_fitting`; and refuses data without a pair to train on, or to measure on."""
    check_fitting(f'{field}.preference', settings.preference, model.config, compute, rows_per_item=2)
    longest = settings.preference.batch.lengths[-1]
    halves = f"the split 'train', half={settings.half!r}"
    for where, pairs in (
        (halves, pairs_of(settings.half, preferences)),
        ("the split 'test'", of_split(preferences, 'test')),
    ):
        if not any(preference_rows([pair], model.chat, longest, on_long='drop')[0] for pair in pairs):
            raise ConfigError(
                f'{field}: expected a pair of {where} that fits into preference.batch.lengths={longest} tokens, '
                f'found none among {len(pairs)}; all of the data: {_splits(preferences)}'
            )


def check_validation(settings: RLSettings, available: int) -> None:
    """Refuses a validation that never comes between steps, or needs more than the `available` examples."""
    validation = settings.validation
    if validation is None:
        return
    if validation.every > settings.steps:
        raise ConfigError(
            f'config.rl.validation.every: expected at most the {settings.steps} steps of the run, '
            f'found {validation.every}'
        )
    if validation.examples > available:
        raise ConfigError(
            f"config.rl.validation.examples: expected at most the {available} examples of the split 'dev' that fit, "
            f'found {validation.examples}'
        )


def check_forecast(settings: ForecastSettings | None, available: int, compute: Compute) -> None:
    """Refuses a forecast from more than the `available` examples, or whose rows the devices cannot share evenly."""
    if settings is None:
        return
    what = "examples of the split 'dev' that fit"
    check_most('config.evaluation.forecast.examples', settings.examples, available, what)
    for field in ('examples', 'samples'):
        check_conversations(f'config.evaluation.forecast.{field}', getattr(settings, field), compute)


def check_most(field: str, wanted: int, available: int, what: str) -> None:
    """Refuses a number of things of which fewer are `available`."""
    if wanted > available:
        raise ConfigError(f'{field}: expected at most the {available} {what}, found {wanted}')


def check_rl_steps(settings: RLSettings, available: int, compute: Compute) -> None:
    """Refuses steps of RL that need more than the `available` examples, never end warming up, or do not divide."""
    if available < settings.prompts_per_step:
        raise ConfigError(
            f'config.rl.prompts_per_step: expected at most the {available} examples that RL starts from, '
            f'found {settings.prompts_per_step}'
        )
    updates = settings.steps * settings.algorithm.updates_per_batch
    if settings.optimizer.warmup_steps >= updates:
        raise ConfigError(
            f'config.rl.optimizer.warmup_steps: expected fewer than the {updates} updates of the run, '
            f'found {settings.optimizer.warmup_steps}'
        )
    rows = settings.prompts_per_step * settings.samples_per_prompt
    try:
        at_once = rows_at_once(rows, compute.rows_in_flight)
    except ValueError as error:
        raise ConfigError(f'config.compute.{error}') from error
    check_conversations('config.rl.prompts_per_step x samples_per_prompt', rows, compute)
    check_conversations('config.compute.rows_in_flight', at_once, compute)
    check_split(
        'config.rl.prompts_per_step x samples_per_prompt / (minibatches x microbatches)',
        settings.algorithm.rows_per_microbatch(rows),
        compute,
    )
