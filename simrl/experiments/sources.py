"""Read a model with its tokenizer, and people's conversations and choices."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.huggingface_tokenizer import terminal_id
from simrl.conversations.manifest import check_data
from simrl.conversations.records import Check, Conversation, OnBadRows, Preference, read_conversations, read_preferences
from simrl.conversations.templates import Rewrites, chat_from_huggingface
from simrl.models import sharding, transformer
from simrl.models.files.gguf_file import shard_paths
from simrl.models.files.load import find_folder, load_config, load_params, resize_vocabulary
from simrl.models.transformer import Params, TransformerConfig
from simrl.run import config as config_lib
from simrl.run.config import ConfigError

T = TypeVar('T')
Record = TypeVar('Record', Conversation, Preference)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A model with random initial weights."""

    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    max_positions: int  # max tokens of a row
    tied_embedding: bool = True  # one matrix for input and output; tiny models learn to copy sooner with two
    seed: int = 0  # seed of the weights

    def __post_init__(self) -> None:
        for field in ('model_dim', 'num_layers', 'num_heads', 'num_kv_heads', 'mlp_dim', 'max_positions'):
            if getattr(self, field) < 1:
                raise ValueError(f'RandomModel.{field}: expected at least 1, found {getattr(self, field)}')
        if (size := self.model_dim // self.num_heads) % 2 or not size:
            raise ValueError(
                f'RandomModel.model_dim: expected heads of an even size, model_dim // num_heads, '
                f'found {self.model_dim} // {self.num_heads} = {size}'
            )
        try:
            self.transformer_config(vocab_size=1)
        except ValueError as error:
            raise ValueError(str(error).replace('TransformerConfig', 'RandomModel')) from error

    def transformer_config(self, vocab_size: int) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=vocab_size,
            model_dim=self.model_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.model_dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            max_positions=self.max_positions,
            tied_embedding=self.tied_embedding,
        )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model that all sides of an experiment start from."""

    source: str  # a hub name OWNER/MODEL, a local Hugging Face folder, or a .gguf file (any of its shards)
    rewrites: Rewrites = 'error'  # rule for a template that rewrites history; see `chat_from_huggingface`
    date: str | None = None  # today, for a template that writes the date, such as '26 Jul 2024'
    revision: str | None = None  # revision of a hub model; None: its main branch
    random: RandomModel | None = None  # replaces the source's weights, for tests; the tokenizer stays

    def __post_init__(self) -> None:
        try:
            config_lib.local_path(self.source)
        except ValueError as error:
            raise ValueError(f'ModelSettings.source: {error}') from error


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model whose vocabulary has the terminal token. Its weights are read by `load_params` alone.

    Attributes:
        settings: where it comes from, with the commit as the revision of a hub's model.
        config: of the decoder, the terminal token included.
        stored: its config as it comes, without rows for further tokens.
        chat: its tokenizer and template.
        tokenizer: the transformers tokenizer that the chat was made of; only exported models have the terminal token.
    """

    settings: ModelSettings
    config: TransformerConfig
    stored: TransformerConfig
    chat: Chat
    tokenizer: Any

    @property
    def knows_terminal(self) -> bool:
        """True for a model that was exported with the terminal token: its row is kept."""
        return terminal_id(self.tokenizer) is not None

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token, without the terminal token."""
        return {token: i for token, i in self.tokenizer.get_vocab().items() if token != TERMINAL_TEXT}

    def load_params(self, mesh: Mesh | None = None) -> Params:
        """Reads the weights. The terminal token starts as a copy of the user's end-of-turn, unless the model knows it.

        Args:
            mesh: where given, the params are read, or made, straight into the shards of training on it.

        Returns:
            float32 `{'decoder'}`; without a mesh on the host or, where random, on one device.
        """
        settings, config = self.settings, self.stored
        if settings.random is None:
            params = load_params(settings.source, config, mesh=mesh, revision=settings.revision)
        else:
            key = jax.random.key(settings.random.seed)
            if mesh is None:
                params = transformer.init_params(key, config)
            else:
                params = sharding.init_sharded(key, config, mesh, sharding.TRAINING_RULES)
        if self.knows_terminal and config.vocab_size >= self.chat.size:
            return params
        params, _ = resize_vocabulary(params, config, self.chat.size, self.chat.terminal_start)
        return params


def open_model(settings: ModelSettings) -> Model:
    """Reads a model's config, tokenizer and chat template, and none of its weights.

    Returns:
        The model. The revision in its settings is the commit, for a hub's model: weights that are read later, and the
        next run, are those of this one.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; or the chat template cannot be used.
    """
    if not model_files('model', settings) and not settings.source.endswith('.gguf'):
        # Without the network it is the commit in the hub's cache.
        settings = dataclasses.replace(settings, revision=find_folder(settings.source, settings.revision).name)
    stored, tokenizer = load_config(settings.source, revision=settings.revision)
    chat = chat_from_huggingface(tokenizer, rewrites=settings.rewrites, date=settings.date)
    _check_rows(settings.source, stored, chat)
    if settings.random is not None:
        stored = settings.random.transformer_config(stored.vocab_size)
    config = dataclasses.replace(stored, vocab_size=max(stored.vocab_size, chat.size))
    return Model(settings, config, stored, chat, tokenizer)


def open_for(field: str, settings: ModelSettings) -> Model:
    """`open_model` for a field of the config, which its errors name.

    Raises:
        ConfigError: the model cannot be used.
    """
    try:
        return open_model(settings)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f'{field}: {error}') from error


def _check_rows(source: str, config: TransformerConfig, chat: Chat) -> None:
    """Refuses tokens without a row of the embedding, except special tokens that neither texts nor the template have."""
    headers = (chat.headers, chat.first_headers, chat.headers_after_system)
    runs = (*(run for by_role in headers for run in by_role.values()), chat.default_prefix, chat.system_header or ())
    written = {*chat.end_of_turn.values(), chat.system_end, *(i for run in runs for i in run)}
    beyond = set(range(config.vocab_size, chat.tokenizer.size)) - (chat.reserved - written)
    if beyond:
        raise ValueError(
            f'{source}: expected an embedding row for each of the {chat.tokenizer.size} tokens of the tokenizer, found '
            f'vocab_size={config.vocab_size} rows; token {min(beyond)} is {chat.decode([min(beyond)])!r}'
        )


def model_files(name: str, settings: ModelSettings) -> dict[str, pathlib.Path]:
    """The file or folder that a model comes from, as an input of stages; of a GGUF file in shards, each of them.

    A hub's model has none: it is known by its name and commit.
    """
    path = config_lib.local_path(settings.source)
    if not path.exists():
        return {}
    first, *others = shard_paths(path) if path.suffix == '.gguf' else [path]
    return {name: first, **{f'{name} shard {number}': shard for number, shard in enumerate(others, start=2)}}


def model_identity(settings: ModelSettings) -> dict[str, Any]:
    """Settings of a model that a stage's results depend on.

    A hub's model is known by its name and commit. One that is here is an input of the stage, known by its contents,
    wherever it lies.

    Args:
        settings: of a `Model`.
    """
    plain: dict[str, Any] = config_lib.to_dict(settings)
    if model_files('model', settings):
        del plain['source'], plain['revision']
    return plain


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """People's conversations and choices; both files have rows of the splits train, dev and test."""

    folder: pathlib.Path
    conversations: pathlib.Path = pathlib.Path('conversations.jsonl.gz')  # in the folder
    preferences: pathlib.Path = pathlib.Path('preferences.jsonl.gz')
    on_bad_rows: OnBadRows = 'raise'  # 'drop' counts them by reason


def conversations_file(settings: DataSettings) -> pathlib.Path:
    return settings.folder / settings.conversations


def preferences_file(settings: DataSettings) -> pathlib.Path:
    return settings.folder / settings.preferences


def conversations_of(settings: DataSettings, check: Check) -> list[Conversation]:
    """Reads the conversations and prints how many rows were dropped or changed, by reason.

    Args:
        check: raises ValueError for a text that cannot be used, such as `Chat.check`.

    Raises:
        RowError, OSError: as `read_conversations`.
        ValueError: no row is left; or the file is not the one that the manifest beside it describes.
    """
    check_data(path := conversations_file(settings))
    conversations, counts = read_conversations(path, on_bad_rows=settings.on_bad_rows, check=check)
    print_counts('conversations', len(conversations), counts)
    _check_some(path, conversations)
    return conversations


def preferences_of(settings: DataSettings, check: Check) -> list[Preference]:
    """Reads the preferences as `conversations_of` reads conversations."""
    check_data(path := preferences_file(settings))
    preferences, counts = read_preferences(path, on_bad_rows=settings.on_bad_rows, check=check)
    print_counts('preferences', len(preferences), counts)
    _check_some(path, preferences)
    return preferences


def _check_some(path: pathlib.Path, rows: Sequence[Any]) -> None:
    if not rows:
        raise ValueError(f'{path}: expected at least one row that can be used, found none')


def of_split(records: Sequence[Record], split: str) -> list[Record]:
    return [record for record in records if record.split == split]


def print_counts(what: str, kept: int, counts: collections.Counter[str]) -> None:
    """One line: how many rows there are, and what happened to others."""
    rest = ''.join(f'; {reason}: {number}' for reason, number in sorted(counts.items()))
    print(f'{what}: {kept}{rest}', flush=True)


def balanced(conversations: Sequence[Conversation], number: int, seed: int) -> list[Conversation]:
    """`number` of the conversations by seed, in their order, equally many of each source as far as it has them.

    More are the same ones and others.
    """
    order = np.random.default_rng(seed).permutation(len(conversations)).tolist()
    seen: collections.Counter[str] = collections.Counter()
    rank: dict[int, int] = {}  # of a conversation among those of its source
    for i in order:
        rank[i] = seen[conversations[i].source]
        seen[conversations[i].source] += 1
    return [conversations[i] for i in sorted(sorted(order, key=rank.__getitem__)[:number])]


def subsample(items: Sequence[T], number: int | None, seed: int) -> list[T]:
    """`number` of the items by seed, in their order; all of them where it is None or there are no more."""
    if number is None or number >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).choice(len(items), number, replace=False)
    return [items[i] for i in sorted(chosen)]
