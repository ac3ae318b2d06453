"""Fine-tuning and reward models as stages: read rows, train, save params and what was measured on held-out rows."""

import collections
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from simrl.conversations.chat import ROLE_CODES, Chat, Header
from simrl.conversations.records import Conversation, Preference
from simrl.conversations.views import OnLong, Rendered, assistant_rows, default_system, preference_rows, user_rows
from simrl.evaluation.shares import cluster_shares
from simrl.experiments.kept_rows import kept_pairs, kept_rows
from simrl.experiments.outputs import lines_at, save_params, save_result
from simrl.experiments.settings import Compute
from simrl.experiments.sources import Model, of_split, print_counts, subsample
from simrl.models.transformer import Params, TransformerConfig
from simrl.run import config as config_lib
from simrl.run import processes
from simrl.training import partition, preference, sft
from simrl.training.preference import PreferenceSettings, longer_wins
from simrl.training.sft import SFTSettings

Half = Literal['first', 'second', 'both']
HALVES: tuple[Half, Half] = ('first', 'second')  # of the training pairs: one for the reward model, one for the judge


@dataclasses.dataclass(frozen=True)
class UserSFTSettings:
    """Fine-tuning of a user simulator on people's messages, or of an assistant on assistants'."""

    sft: SFTSettings
    role: Header = 'user'  # role whose messages are learned
    on_long: OnLong = 'cut'  # what to do with conversations longer than the longest bucket; both are counted
    held_out: int | None = None  # conversations of the test split that the loss is measured on; None: all
    held_out_seed: int = 0  # seed of their choice

    def __post_init__(self) -> None:
        if self.held_out is not None and self.held_out < 1:
            raise ValueError(f'UserSFTSettings.held_out: expected at least 1, or None, found {self.held_out}')
        if self.held_out_seed < 0:
            raise ValueError(f'UserSFTSettings.held_out_seed: expected at least 0, found {self.held_out_seed}')


@dataclasses.dataclass(frozen=True)
class RewardModelSettings:
    """A reward model from people's choices. Two models with different halves share no pair of one opening."""

    preference: PreferenceSettings
    half: Half = 'both'  # half of the training pairs, which are split by a hash of their opening
    held_out: int | None = None  # pairs of the test split that accuracy is measured on; None: all
    held_out_seed: int = 0  # seed of their choice

    def __post_init__(self) -> None:
        if self.held_out is not None and self.held_out < 1:
            raise ValueError(f'RewardModelSettings.held_out: expected at least 1, or None, found {self.held_out}')
        if self.held_out_seed < 0:
            raise ValueError(f'RewardModelSettings.held_out_seed: expected at least 0, found {self.held_out_seed}')


def half_of(pair: Preference) -> Half:
    """The half that a pair is in, by a hash of the opening: pairs of one opening are in one half."""
    return HALVES[hashlib.sha256(pair.opening.encode()).digest()[0] % len(HALVES)]


def pairs_of(half: Half, preferences: Sequence[Preference]) -> list[Preference]:
    """The training pairs of a half, or of both."""
    return [pair for pair in of_split(preferences, 'train') if half in ('both', half_of(pair))]


def fit_role(
    folder: pathlib.Path,
    load: Callable[[], Params],
    rows: Sequence[Rendered],
    held_out: Sequence[Rendered],
    *,
    config: TransformerConfig,
    chat: Chat,
    role: Header,
    settings: SFTSettings,
    compute: Compute,
    hyperparameters: Mapping[str, Any],
) -> dict[str, float]:
    """Fine-tunes on the turns of `role`, saves the params, and returns the held-out losses before and after.

    `loss` is of all trained tokens, `content_loss` of those that end no message.

    Args:
        load: makes the parameters to start from; called again where adapters are added to them.
    """
    mesh = compute.mesh.make()
    state = sft.fine_tune(
        folder,
        load,
        rows,
        held_out,
        config=config,
        token_mask=chat.token_mask(config.padded_vocab_size, terminal=role == 'user', header=role),
        execution=compute.training,
        settings=settings,
        # Always before and after, whatever the loop's own setting.
        loop_settings=dataclasses.replace(compute.loop, evaluate_every=compute.loop.evaluate_every or settings.steps),
        mesh=mesh,
        ends=(chat.terminal, *sorted({chat.end_of_turn[role] for role in ROLE_CODES if chat.ends(role)})),
        compile_threads=compute.threads_to_compile(),
        hyperparameters=hyperparameters,
    )
    save_params(folder, partition.whole_decoder(load, state.params, config, settings.lora, mesh))
    lines = dict(zip(('before', 'after'), lines_at(folder, (0, settings.steps)), strict=True))
    return {
        f'held_out_{name}_{when}': line[f'held_out/{name}']
        for name in ('loss', 'content_loss')
        for when, line in lines.items()
    }


def rows_of(
    conversations: Sequence[Conversation],
    settings: UserSFTSettings,
    model: Model,
    system: Callable[[Conversation], str] | None = None,
) -> tuple[list[Rendered], collections.Counter[str]]:
    """Conversations as rows of the role that is learnt, and counts of what was cut or dropped.

    Args:
        system: the system text of a user's rows; None: the template's default.
    """
    if settings.role == 'assistant':
        return assistant_rows(conversations, model.chat, settings.sft.batch.lengths[-1], on_long=settings.on_long)
    return user_rows(
        conversations,
        model.chat,
        settings.sft.batch.lengths[-1],
        on_long=settings.on_long,
        system=default_system if system is None else system,
    )


def fine_tune_user(
    folder: pathlib.Path,
    model: Model,
    people: Sequence[Conversation],
    settings: UserSFTSettings,
    compute: Compute,
    system: Callable[[Conversation], str] | None = None,
) -> None:
    """Fine-tunes on the turns of `settings.role`, and measures the loss on held-out people before and after.

    Args:
        system: the system text of a user's rows; None: the template's default.
    """
    files = {split: folder / f'{split}_rows.npz' for split in ('train', 'test')}
    (rows, counts), (held_out, held_out_counts) = (
        kept_rows(file, functools.partial(rows_of, of_split(people, split), settings, model, system))
        for split, file in files.items()
    )
    print_counts('rows to train on', len(rows), counts)
    print_counts('rows held out', len(held_out), held_out_counts)
    measured = subsample(held_out, settings.held_out, settings.held_out_seed)
    losses = fit_role(
        folder,
        functools.partial(model.load_params, compute.mesh.make()),
        rows,
        measured,
        config=model.config,
        chat=model.chat,
        role=settings.role,
        settings=settings.sft,
        compute=compute,
        hyperparameters=config_lib.to_dict(settings),
    )
    _forget(*files.values())
    save_result(
        folder,
        losses
        | {
            'held_out_rows': len(measured),
            'train_rows': len(rows),
            'counts': dict(counts),
            'held_out_counts': dict(held_out_counts),
        },
    )


def _forget(*files: pathlib.Path) -> None:
    """Deletes the rows that a stage kept, which all processes have read."""
    for file in files if processes.leads() else ():
        file.unlink(missing_ok=True)


def fit_reward_model(
    folder: pathlib.Path,
    model: Model,
    preferences: Sequence[Preference],
    settings: RewardModelSettings,
    compute: Compute,
) -> None:
    """Trains a reward model, and measures its accuracy on held-out pairs beside that of "longer wins"."""
    chat, mesh = model.chat, compute.mesh.make()
    batch = settings.preference.batch
    pairs, file = pairs_of(settings.half, preferences), folder / 'train_rows.npz'
    rows, counts = kept_pairs(file, lambda: preference_rows(pairs, chat, batch.lengths[-1], on_long='drop'))
    print_counts('pairs to train on', len(rows), counts)
    state = preference.fit(
        folder,
        functools.partial(model.load_params, mesh),
        rows,
        config=model.config,
        execution=compute.training,
        settings=settings.preference,
        loop_settings=dataclasses.replace(compute.loop, evaluate_every=0),
        mesh=mesh,
        compile_threads=compute.threads_to_compile(),
        hyperparameters=config_lib.to_dict(settings),
    )
    save_params(folder, state.params)
    _forget(file)

    fits: list[Preference] = []
    held_out_counts: collections.Counter[str] = collections.Counter()
    for pair in of_split(preferences, 'test'):
        rendered, dropped = preference_rows([pair], chat, batch.lengths[-1], on_long='drop')
        fits += [pair] if rendered else []
        held_out_counts += dropped
    print_counts('pairs held out', len(fits), held_out_counts)
    measured = subsample(fits, settings.held_out, settings.held_out_seed)
    held_out, _ = preference_rows(measured, chat, batch.lengths[-1])
    margins = preference.margins(
        state.params, held_out, batch, config=model.config, execution=compute.training, mesh=mesh
    )
    openings = [pair.opening for pair in measured]
    right = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    accuracy, length = cluster_shares([right, longer_wins(measured)], openings)
    print(f'held-out accuracy {accuracy}; "longer wins" {length}', flush=True)
    save_result(
        folder,
        {
            'accuracy': accuracy,
            'longer_wins': length,
            'train_pairs': len(rows),
            'counts': dict(counts),
            'held_out_counts': dict(held_out_counts),
        },
    )
