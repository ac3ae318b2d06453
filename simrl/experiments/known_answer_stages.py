"""The stages of the experiment in the concierge world: each reads other stages' folders and writes its own.

As those of `jobs.py`: `params/` is what later stages read, `result.json` what is reported.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from simrl.conversations.batches import BatchSettings
from simrl.conversations.chat import Header
from simrl.conversations.records import Conversation, End, Example, Message, read_conversations, write_conversations
from simrl.conversations.sentencepiece import train_sentencepiece
from simrl.conversations.views import Rendered, assistant_rows, user_rows
from simrl.evaluation.fidelity import row_log_likelihoods
from simrl.experiments.concierge_scene import (
    SIMULATORS,
    TOKENIZER_FILE,
    Scene,
    assistant_speaker,
    ended,
    hold_conversations,
    intent_of,
    people_examples,
    people_partner,
    satisfaction,
    simulator,
    spoken,
)
from simrl.experiments.jobs import fit_role, load_params, metric_lines, save_params, save_result
from simrl.experiments.sources import RandomModel, print_counts
from simrl.models import sharding, transformer
from simrl.models.transformer import Params
from simrl.rl import train
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits, ModelAgent
from simrl.rollouts.state import example_hash
from simrl.run import config as config_lib
from simrl.training import partition
from simrl.training.sft import SFTSettings
from simrl.worlds.concierge import scripted
from simrl.worlds.concierge.outcomes import outcome_of, user_statistics
from simrl.worlds.concierge.people import World, person_of

ASSISTANT_CORPUS, BASE_USER_CORPUS = 'assistant.jsonl.gz', 'base_user.jsonl.gz'
LOGS, HELD_OUT_LOGS = 'logs.jsonl.gz', 'held_out.jsonl.gz'
# Steps in `row_keys`, far above those of training runs: no two uses draw the same numbers.
LOGS_STEP, EVALUATION_STEP, MATRIX_STEP = 2**31 - 2, 2**31 - 3, 2**31 - 4
AROUND_MESSAGE = 2  # tokens: a header and an end-of-turn
# The people of the train split: scripted conversations have the first ones, logs and RL start far above.
FIRST_LOGGED, FIRST_IN_RL = 10**6, 2 * 10**6


@dataclasses.dataclass(frozen=True)
class Corpora:
    """How much text there is, in conversations but for the vocabulary."""

    vocabulary: int  # ids of the tokenizer, its control symbols included
    assistant: int  # scripted conversations that the initial assistant imitates
    base_user: int  # of stereotypes, that the base user model imitates
    logs: int  # of people with the initial assistant, that simulators are fine-tuned on
    held_out: int  # of each of these three, that losses are measured on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f'Corpora.{field.name}: expected at least 1, found {getattr(self, field.name)}')


@dataclasses.dataclass(frozen=True)
class Assistant:
    """An assistant: the stage whose params it has, and its model."""

    stage: pathlib.Path
    model: RandomModel


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A simulator of an arm: what kind, the stage whose params it has, and its model."""

    kind: str  # role_play, persona or fine_tuned
    stage: pathlib.Path
    model: RandomModel


def longest_conversation(limits: Limits) -> int:
    """Tokens of a conversation in any view, at most."""
    return limits.prompt_tokens + limits.turns * (limits.assistant_tokens + limits.user_tokens + 2 * AROUND_MESSAGE)


def make_world(
    folder: pathlib.Path, world: World, *, vocabulary: int, assistant: int, base_user: int, held_out: int
) -> None:
    """The scripted conversations, and a tokenizer trained on them; the numbers are those of `Corpora`."""
    assistants = scripted.assistant_corpus(world, assistant + held_out)
    users = scripted.base_user_corpus(world, base_user + held_out)
    texts = [text for c in (*assistants, *users) for text in (c.intent or '', *(turn.content for turn in c.messages))]
    (folder / TOKENIZER_FILE).write_bytes(train_sentencepiece(texts, vocabulary))
    write_conversations(folder / ASSISTANT_CORPUS, assistants)
    write_conversations(folder / BASE_USER_CORPUS, users)
    save_result(folder, {'assistant_conversations': len(assistants), 'user_conversations': len(users)})


def fit_assistant(
    folder: pathlib.Path,
    world_stage: pathlib.Path,
    scene: Scene,
    model: RandomModel,
    settings: SFTSettings,
    held_out: int,
) -> None:
    """The initial assistant imitates the scripted one."""
    corpus, _ = read_conversations(world_stage / ASSISTANT_CORPUS)
    rows, counts = assistant_rows(corpus, scene.chat, settings.batch.lengths[-1], on_long='cut')
    _fit(folder, _random(model, scene), rows, held_out, counts, scene, model, 'assistant', settings)


def fit_base_user(
    folder: pathlib.Path,
    world_stage: pathlib.Path,
    scene: Scene,
    model: RandomModel,
    settings: SFTSettings,
    held_out: int,
) -> None:
    """The base user model learns what stereotypes of users say, each under its name."""
    corpus, _ = read_conversations(world_stage / BASE_USER_CORPUS)
    rows, counts = _user_rows(corpus, scene, settings.batch)
    _fit(folder, _random(model, scene), rows, held_out, counts, scene, model, 'user', settings)


def fine_tune_simulator(
    folder: pathlib.Path,
    base_stage: pathlib.Path,
    logs_stage: pathlib.Path,
    scene: Scene,
    model: RandomModel,
    settings: SFTSettings,
    seed: int,
) -> None:
    """The base user model learns what people said to the initial assistant, from their intents.

    Of two training seeds the batches come in different orders; the base model and the logs are the same.
    """
    settings = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, seed=settings.batch.seed + seed))
    logs, _ = read_conversations(logs_stage / LOGS)
    held_out, _ = read_conversations(logs_stage / HELD_OUT_LOGS)
    rows, counts = _user_rows([*logs, *held_out], scene, settings.batch)
    params = _load(base_stage, model, scene)
    _fit(folder, params, rows, len(held_out), counts, scene, model, 'user', settings)


def _user_rows(
    conversations: Sequence[Conversation], scene: Scene, batch: BatchSettings
) -> tuple[list[Rendered], collections.Counter[str]]:
    return user_rows(conversations, scene.chat, batch.lengths[-1], on_long='cut', intents=True, openings='trained')


def _random(model: RandomModel, scene: Scene) -> Params:
    return transformer.init_params(jax.random.key(model.seed), model.transformer_config(scene.chat.size))


def _load(stage: pathlib.Path, model: RandomModel, scene: Scene) -> Params:
    config = model.transformer_config(scene.chat.size)
    return load_params(stage, config, (), scene.compute.mesh.make(), sharding.SAMPLING_RULES)


def _fit(
    folder: pathlib.Path,
    params: Params,
    rows: Sequence[Rendered],
    held_out: int,
    counts: collections.Counter[str],
    scene: Scene,
    model: RandomModel,
    role: Header,
    settings: SFTSettings,
) -> None:
    """Fits all rows but the last `held_out`, on which the loss is measured."""
    print_counts(f'rows ({held_out} of them held out)', len(rows), counts)
    losses = fit_role(
        folder,
        params,
        rows[:-held_out],
        rows[-held_out:],
        config=model.transformer_config(scene.chat.size),
        chat=scene.chat,
        role=role,
        settings=settings,
        compute=scene.compute,
        hyperparameters=config_lib.to_dict(settings),
    )
    save_result(folder, losses | {'train_rows': len(rows) - held_out, 'counts': dict(counts)})


def collect_logs(
    folder: pathlib.Path,
    assistant: Assistant,
    scene: Scene,
    corpora: Corpora,
    batch_size: int,
) -> None:
    """People talk with the initial assistant; the conversations are kept as any collection's would be."""
    helper = _assistant(assistant, scene)
    dropped = {}  # conversations in which a message is empty, which a collection would not hold
    for split, start, number, name in (
        ('train', FIRST_LOGGED, corpora.logs, LOGS),
        ('dev', 0, corpora.held_out, HELD_OUT_LOGS),
    ):
        examples = people_examples(scene.world, split, range(start, start + number))
        user = people_partner(scene)
        rows = hold_conversations(
            helper, user, examples, scene, seed=0, step=LOGS_STEP, batch_size=batch_size, name=f'logs, {split}'
        )
        kept = [pair for pair in zip(examples, rows, strict=True) if all(text for _, text in spoken(pair[1]))]
        dropped[name] = number - len(kept)
        write_conversations(folder / name, [_record(*pair) for pair in kept])
    save_result(folder, {'conversations': corpora.logs, 'held_out': corpora.held_out, 'dropped_empty': dropped})


def _record(example: Example, row: Mapping[str, Any]) -> Conversation:
    """A conversation as a collection would keep it, with the intent of who had it."""
    turns = tuple(Message(role, text) for role, text in spoken(row))  # type: ignore[arg-type]
    cut = [dataclasses.replace(t, truncated=m['truncated']) for t, m in zip(turns, row['messages'], strict=True)]
    end: End = 'natural' if ended(row) else 'cut'
    return Conversation(example.id, example.source, example.split, tuple(cut), end, example.intent)


def train_arm(
    folder: pathlib.Path,
    assistant: Assistant,
    simulated: Simulated | None,
    scene: Scene,
    people: int,
    settings: RLSettings,
    seed: int,
) -> None:
    """RL of the initial assistant against one simulator, or against the people themselves (None: the oracle)."""
    helper, mesh = _assistant(assistant, scene), scene.compute.mesh.make()
    examples = people_examples(scene.world, 'train', range(FIRST_IN_RL, FIRST_IN_RL + people))
    state = train.train(
        folder,
        people_partner(scene) if simulated is None else _simulator(simulated, scene),
        helper,
        chat=scene.chat,
        examples=examples,
        score=satisfaction(scene, examples),
        limits=scene.limits,
        settings=settings,
        execution=scene.compute.training,
        loop_settings=dataclasses.replace(scene.compute.loop, evaluate_every=0),
        seed=seed,
        rows_in_flight=scene.compute.rows_in_flight,
        mesh=mesh,
        hyperparameters=config_lib.to_dict(settings),
    )
    decoder = partition.whole_decoder(
        helper.policy.params, state.params, helper.policy.spec.config, settings.lora, mesh
    )
    save_params(folder, decoder)
    lines = metric_lines(folder)
    names = (
        *('step', 'reward/mean', 'reward/share_met', 'rollout/end_signal', 'rollout/truncated_user', 'kl_k3'),
        *('entropy', 'groups', 'groups_zero_variance'),
    )
    save_result(folder, {name: [line[name] for line in lines] for name in names if name in lines[0]})


def _assistant(assistant: Assistant, scene: Scene) -> ModelAgent:
    config = assistant.model.transformer_config(scene.chat.size)
    return assistant_speaker(scene, config, _load(assistant.stage, assistant.model, scene))


def _simulator(simulated: Simulated, scene: Scene) -> ModelAgent:
    config = simulated.model.transformer_config(scene.chat.size)
    return simulator(simulated.kind, scene, config, _load(simulated.stage, simulated.model, scene))


def evaluate_on_people(
    folder: pathlib.Path,
    assistant: Assistant,
    scene: Scene,
    numbers: range,
    seed: int,
    batch_size: int,
    shown: int,
) -> None:
    """New people, the same for every assistant, talk with one: what each conversation was worth.

    Args:
        numbers: which people of the test split.
        shown: of how many the conversation is kept in the result.
    """
    helper = _assistant(assistant, scene)
    examples = people_examples(scene.world, 'test', numbers)
    user = people_partner(scene)
    rows = hold_conversations(
        helper, user, examples, scene, seed=seed, step=EVALUATION_STEP, batch_size=batch_size, name='people'
    )
    columns = _outcomes(examples, rows)
    talks = [
        {
            'example': example.id,
            'intent': example.intent,
            'traits': dataclasses.asdict(person_of(scene.world, example.id).traits),
            'messages': [{'role': role, 'content': text} for role, text in spoken(row)],
        }
        for example, row in zip(examples[:shown], rows, strict=False)
    ]
    save_result(folder, {'outcomes': columns, 'statistics': _statistics(examples, rows), 'shown': talks})


def evaluate_on_simulator(
    folder: pathlib.Path,
    assistant: Assistant,
    simulated: Simulated,
    scene: Scene,
    number: int,
    seed: int,
    batch_size: int,
) -> None:
    """A simulator plays the first people of the test split for one assistant: a cell of the matrix."""
    helper = _assistant(assistant, scene)
    examples = people_examples(scene.world, 'test', range(number))
    user = _simulator(simulated, scene)
    rows = hold_conversations(
        helper, user, examples, scene, seed=seed, step=MATRIX_STEP, batch_size=batch_size, name='simulator'
    )
    save_result(folder, {'outcomes': _outcomes(examples, rows), 'statistics': _statistics(examples, rows)})


def measure_likelihood(
    folder: pathlib.Path, simulated: Simulated, logs_stage: pathlib.Path, scene: Scene, batch_size: int
) -> None:
    """How well a simulator predicts what people, held out, said to the initial assistant, under its own system text.

    Rows are as long as conversations may be, so that the same tokens count whatever a simulator is told.
    """
    logs, _ = read_conversations(logs_stage / HELD_OUT_LOGS)
    told = SIMULATORS[simulated.kind]
    asked = [
        dataclasses.replace(
            log, intent=told(Example(log.id, None, log.intent, example_hash(log.id), log.source, log.split))
        )
        for log in logs
    ]
    batch = BatchSettings(batch_size, (longest_conversation(scene.limits),))
    rows, _ = user_rows(asked, scene.chat, batch.lengths[-1], on_long='error', intents=True, openings='trained')
    config = simulated.model.transformer_config(scene.chat.size)
    log_likelihood, tokens = row_log_likelihoods(
        _load(simulated.stage, simulated.model, scene),
        rows,
        scene.chat.token_mask(config.padded_vocab_size, terminal=True, header='user'),
        batch,
        config=config,
        execution=scene.compute.training,
        mesh=scene.compute.mesh.make(),
    )
    save_result(folder, {'log_likelihood': log_likelihood.tolist(), 'tokens': tokens.tolist()})


def _outcomes(examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What each conversation was worth to whoever had it, in columns, in the order of the examples."""
    outcomes = [outcome_of(intent_of(e), spoken(row), ended(row)) for e, row in zip(examples, rows, strict=True)]
    cut = {
        role: [sum(m['truncated'] for m in row['messages'] if m['role'] == role) for row in rows]
        for role in ('assistant', 'user')
    }
    ids = [example.id for example in examples]
    return {
        'example': ids,
        'cluster': ids,
        'score': [x.satisfaction for x in outcomes],
        'share_met': [x.share_met for x in outcomes],
        'end': ['accepted' if x.accepted else 'left' if x.left else 'turns' for x in outcomes],
        'assistant_turns': [x.assistant_turns for x in outcomes],
        'first_act': [x.first_act for x in outcomes],
        'truncated': cut['assistant'],
        'user_truncated': cut['user'],
    }


def _statistics(examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of how the users talked, summed over conversations."""
    total: collections.Counter[str] = collections.Counter(conversations=len(rows))
    for example, row in zip(examples, rows, strict=True):
        total.update(dataclasses.asdict(user_statistics(intent_of(example), spoken(row), ended(row))))
    return dict(total)
