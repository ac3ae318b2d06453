"""The work of the concierge world's first stages: text and tokenizer, initial assistant, user models, logs.

Each function gets its stage's folder first; `concierge_stages.py` lists the stages.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax

from simrl.conversations.chat import Chat, Header
from simrl.conversations.records import Conversation, read_conversations, write_conversations
from simrl.conversations.sentencepiece import train_sentencepiece
from simrl.conversations.views import Rendered, assistant_rows, told_intent, user_rows
from simrl.experiments.concierge_people import log_of, people_examples, spoken
from simrl.experiments.fitting import fit_role
from simrl.experiments.outputs import save_result
from simrl.experiments.replies import scored_conversations
from simrl.experiments.settings import Compute
from simrl.experiments.sources import RandomModel, print_counts
from simrl.models import transformer
from simrl.models.transformer import Params, TransformerConfig
from simrl.rewards.rewards import unscored
from simrl.rollouts.agents import Agent, Limits, ModelAgent
from simrl.run import config as config_lib
from simrl.run import processes
from simrl.run.stage_files import named_errors
from simrl.training.sft import SFTSettings
from simrl.worlds.concierge import scripted
from simrl.worlds.concierge.people import World

WORLD_STAGE, ASSISTANT_STAGE, LOGS_STAGE = 'world', 'sft/assistant', 'logs'
TOKENIZER_FILE = 'tokenizer.model'
ASSISTANT_CORPUS, BASE_USER_CORPUS = 'assistant.jsonl.gz', 'base_user.jsonl.gz'
LOGS, HELD_OUT_LOGS = 'logs.jsonl.gz', 'held_out.jsonl.gz'
LOGS_STEP = 2**31 - 2  # in the keys of conversations, far above the steps of training
FIRST_LOGGED = 10**6  # of the people of the train split, above those of scripted conversations
USUAL_SIZE = 'medium'  # the size that folders' names leave out


@dataclasses.dataclass(frozen=True)
class Corpora:
    """Amounts of text."""

    vocabulary: int  # token ids, control symbols included; with the terminal token best a multiple of 128
    assistant: int  # scripted conversations that the initial assistant imitates
    base_user: int  # conversations of stereotypes that the base user model imitates
    logs: int  # conversations of people with the initial assistant that simulators are fine-tuned on
    held_out: int  # conversations of each of these three that losses are measured on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f'Corpora.{field.name}: expected at least 1, found {getattr(self, field.name)}')


def base_user_stage(size: str) -> str:
    """The stage of the user model that knows stereotypes."""
    return 'sft/base_user' if size == USUAL_SIZE else f'sft/base_user-{size}'


def fine_tuned_stage(arm: str, seed: int) -> str:
    """The stage of an arm's fine-tuned simulator, trained anew for each training seed."""
    return f'sft/{arm}/seed-{seed}'


@dataclasses.dataclass(frozen=True, eq=False)
class Fitting:
    """Arguments that all fine-tuning stages share.

    Attributes:
        world: the world's stage.
        held_out: the number of conversations that the loss is measured on.
    """

    world: pathlib.Path
    chat: Chat
    compute: Compute
    held_out: int


def make_world(
    folder: pathlib.Path, *, world: World, vocabulary: int, assistant: int, base_user: int, held_out: int
) -> None:
    """Writes the scripted conversations, and a tokenizer trained on them; the numbers are those of `Corpora`."""
    if not processes.leads():
        return  # nothing here is computed on devices
    assistants = scripted.assistant_corpus(world, assistant + held_out)
    users = scripted.base_user_corpus(world, base_user + held_out)
    texts = [text for c in (*assistants, *users) for text in (c.intent or '', *(turn.content for turn in c.messages))]
    with named_errors(folder / TOKENIZER_FILE):
        (folder / TOKENIZER_FILE).write_bytes(train_sentencepiece(texts, vocabulary))
    write_conversations(folder / ASSISTANT_CORPUS, assistants)
    write_conversations(folder / BASE_USER_CORPUS, users)
    save_result(folder, {'assistant_conversations': len(assistants), 'user_conversations': len(users)})


def fit_assistant(folder: pathlib.Path, model: RandomModel, settings: SFTSettings, fitting: Fitting) -> None:
    """Trains the initial assistant to imitate the scripted one."""
    corpus, _ = read_conversations(fitting.world / ASSISTANT_CORPUS)
    rows, counts = assistant_rows(corpus, fitting.chat, settings.batch.lengths[-1], on_long='cut')
    _fit(folder, *_random(model, fitting.chat), rows, counts, 'assistant', settings, fitting, fitting.held_out)


def fit_base_user(folder: pathlib.Path, model: RandomModel, settings: SFTSettings, fitting: Fitting) -> None:
    """Trains the base user model on what stereotypes of users say, each under its name."""
    corpus, _ = read_conversations(fitting.world / BASE_USER_CORPUS)
    _fit_user(folder, *_random(model, fitting.chat), corpus, settings, fitting, fitting.held_out)


def fine_tune_simulator(
    folder: pathlib.Path,
    config: TransformerConfig,
    load: Callable[[], Params],
    settings: SFTSettings,
    fitting: Fitting,
    logs_stage: pathlib.Path,
    seed: int,
) -> None:
    """Fine-tunes the base user model on what people said to the initial assistant, from their intents.

    The training seed decides the order of the batches; the base model and the logs are the same for all.
    """
    settings = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, seed=settings.batch.seed + seed))
    logs, _ = read_conversations(logs_stage / LOGS)
    held_out, _ = read_conversations(logs_stage / HELD_OUT_LOGS)
    _fit_user(folder, config, load, [*logs, *held_out], settings, fitting, len(held_out))


def collect_logs(
    folder: pathlib.Path,
    people: Agent,
    assistant: ModelAgent,
    corpora: Corpora,
    *,
    world: World,
    chat: Chat,
    limits: Limits,
    batch_size: int,
    compute: Compute,
) -> None:
    """Lets people talk with the initial assistant, and keeps the conversations as any collection would."""
    failed: dict[str, int] = {}
    empty: dict[str, int] = {}  # conversations with an empty message, which a collection would not have
    for split, start, number, name in (
        ('train', FIRST_LOGGED, corpora.logs, LOGS),
        ('dev', 0, corpora.held_out, HELD_OUT_LOGS),
    ):
        examples = people_examples(world, split, range(start, start + number))
        held = scored_conversations(
            *(people, assistant, examples, unscored),
            chat=chat,
            limits=limits,
            compute=compute,
            batch_size=batch_size,
            seed=0,
            step=LOGS_STEP,
            name=f'logs, {split}',
        )
        failed[name] = len(held.causes)
        kept = [i for i in held.kept if all(text for _, text in spoken(held.rows[i]))]
        empty[name] = len(held.kept) - len(kept)
        if processes.leads():
            write_conversations(folder / name, [log_of(examples[i], held.rows[i]) for i in kept])
    found = {'conversations': corpora.logs, 'held_out': corpora.held_out}
    save_result(folder, found | {'dropped_empty': empty, 'dropped_failed': failed})


def _random(model: RandomModel, chat: Chat) -> tuple[TransformerConfig, Callable[[], Params]]:
    config = model.transformer_config(chat.size)
    return config, lambda: transformer.init_params(jax.random.key(model.seed), config)


def _fit_user(
    folder: pathlib.Path,
    config: TransformerConfig,
    load: Callable[[], Params],
    corpus: Sequence[Conversation],
    settings: SFTSettings,
    fitting: Fitting,
    held_out: int,
) -> None:
    rows, counts = user_rows(
        corpus, fitting.chat, settings.batch.lengths[-1], on_long='cut', system=told_intent, openings='trained'
    )
    _fit(folder, config, load, rows, counts, 'user', settings, fitting, held_out)


def _fit(
    folder: pathlib.Path,
    config: TransformerConfig,
    load: Callable[[], Params],
    rows: Sequence[Rendered],
    counts: collections.Counter[str],
    role: Header,
    settings: SFTSettings,
    fitting: Fitting,
    held_out: int,
) -> None:
    """Fits all rows but the last `held_out`, on which the loss is measured."""
    print_counts(f'rows ({held_out} of them held out)', len(rows), counts)
    losses = fit_role(
        folder,
        load,
        rows[:-held_out],
        rows[-held_out:],
        config=config,
        chat=fitting.chat,
        role=role,
        settings=settings,
        compute=fitting.compute,
        hyperparameters=config_lib.to_dict(settings),
    )
    save_result(folder, losses | {'train_rows': len(rows) - held_out, 'counts': dict(counts)})
