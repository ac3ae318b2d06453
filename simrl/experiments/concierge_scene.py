"""Who talks in the concierge world, and what it is worth: people, simulators and assistants as sides of a conversation.

1. `open_scene` reads the world's tokenizer; `people_examples` says who wants what.
2. `assistant_speaker`, `simulator` and `people_partner` make the sides; `hold_conversations` lets two of them talk.
3. `satisfaction` is the reward of every arm.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.records import Example
from simrl.conversations.sentencepiece import sentencepiece_chat
from simrl.conversations.views import natural_prompt
from simrl.experiments.jobs import Compute
from simrl.models import placement
from simrl.models.transformer import Params, TransformerConfig
from simrl.rewards.rewards import Rewards
from simrl.rollouts.agents import Agent, HostAgent, HostConversation, Limits, ModelAgent, Reply, assistant
from simrl.rollouts.collect import collect_batches
from simrl.rollouts.state import EndReason, example_hash
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import Trajectories, transcripts
from simrl.run.config import ConfigError
from simrl.simulators.fine_tuned import FineTunedSettings, fine_tuned, told_intent
from simrl.simulators.personas import directed, drawn_name, one_name
from simrl.worlds.concierge.language import Intent, all_intents
from simrl.worlds.concierge.outcomes import outcome_of
from simrl.worlds.concierge.people import STEREOTYPES, World, person, person_of, persona_name
from simrl.worlds.concierge.replies import speak
from simrl.worlds.concierge.scripted import SOURCE

TOKENIZER_FILE = 'tokenizer.model'
# How each kind of simulator is told what it is to play.
SIMULATORS: Mapping[str, Callable[[Example], str]] = {
    'role_play': one_name('default'),
    'persona': drawn_name(persona_name),
    'fine_tuned': told_intent,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What all stages share: the world, how its text is written for models, and the sizes of conversations."""

    world: World
    chat: Chat
    limits: Limits
    compute: Compute


def open_scene(world_stage: pathlib.Path, world: World, limits: Limits, compute: Compute) -> Scene:
    """The scene whose tokenizer the stage `make_world` left.

    Raises:
        ConfigError: what a simulator may be told is longer than prompts may be.
    """
    chat = sentencepiece_chat((world_stage / TOKENIZER_FILE).read_bytes())
    texts = (directed(name, intent.text) for intent in all_intents() for name in STEREOTYPES)
    longest = max((natural_prompt(chat, None, text).tokens for text in texts), key=len)
    if len(longest) > limits.prompt_tokens:
        raise ConfigError(
            f'config.limits.prompt_tokens: expected at least {len(longest)}, of the longest that a simulator is told '
            f'({chat.decode(longest.tolist())!r}), found {limits.prompt_tokens}'
        )
    return Scene(world, chat, limits, compute)


def people_examples(world: World, split: str, numbers: Iterable[int]) -> list[Example]:
    """What conversations of these people start from. The user opens, whoever plays it."""
    people = [person(world, split, number) for number in numbers]
    return [Example(p.id, None, p.intent.text, example_hash(p.id), SOURCE, split) for p in people]


def assistant_speaker(scene: Scene, config: TransformerConfig, params: Params) -> ModelAgent:
    """A model as an assistant. It sees what is said and nothing else, and is sampled as it is."""
    return assistant(
        scene.chat,
        config,
        params,
        scene.compute.sampling,
        max_new_tokens=scene.limits.assistant_tokens,
        sampling=Sampling(),
    )


def people_partner(scene: Scene) -> HostAgent:
    """The people themselves: each conversation is with the person whose id the example has."""
    person_called = functools.cache(functools.partial(person_of, scene.world))

    def answer(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        said = []
        for conversation, seed in zip(conversations, seeds.tolist(), strict=True):
            heard = [text for role, text in conversation.messages if role == 'assistant']
            reply = speak(person_called(conversation.example.id), heard, seed)
            said.append(Reply(reply.text, ends=reply.end is not None))
        return said

    return HostAgent(answer, max_new_tokens=scene.limits.user_tokens)


def simulator(kind: str, scene: Scene, config: TransformerConfig, params: Params) -> ModelAgent:
    """A user model as the simulator of an arm, of `SIMULATORS`.

    All of them are sampled as they are, and are told the intent; what else they are told is the arm.
    """
    return fine_tuned(
        scene.chat,
        config,
        params,
        scene.compute.sampling,
        max_new_tokens=scene.limits.user_tokens,
        settings=FineTunedSettings(Sampling()),
        system=SIMULATORS[kind],
    )


def intent_of(example: Example) -> Intent:
    return Intent.from_text(told_intent(example))


def spoken(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a person would read of a conversation of `transcripts`: (role, text), end signals left out."""
    return [(m['role'], m['content'].replace(TERMINAL_TEXT, '').strip()) for m in row['messages']]


def ended(row: Mapping[str, Any]) -> bool:
    """Whether the user ended a conversation of `transcripts`."""
    return row['end_reason'] == EndReason.SIGNAL.name.lower()


def satisfaction(scene: Scene, examples: Sequence[Example]) -> Callable[[Trajectories], Rewards]:
    """The reward of every arm: satisfaction, a function of intent and transcript alone.

    Raises:
        ValueError: two examples have the same hash, by which rows name them.
    """
    intents = {example_hash(e.id): intent_of(e) for e in examples}
    if len(intents) < len(examples):
        raise ValueError(f'expected {len(examples)} examples with hashes of their own, found {len(intents)} hashes')

    def score(batch: Trajectories) -> Rewards:
        ids = np.asarray(placement.to_host(batch.example_id)).tolist()
        rows = transcripts(batch, scene.chat.decode)
        outcomes = [outcome_of(intents[i], spoken(row), ended(row)) for i, row in zip(ids, rows, strict=True)]

        def column(values: Sequence[float]) -> jax.Array:
            return jnp.asarray(np.array(values, np.float32))

        return Rewards(
            value=column([o.satisfaction for o in outcomes]),
            valid=jnp.ones(len(rows), bool),
            parts={
                'share_met': column([o.share_met for o in outcomes]),
                'left': column([o.left for o in outcomes]),
            },
            cause=jnp.zeros(len(rows), jnp.int32),
        )

    return score


def hold_conversations(
    helper: ModelAgent,
    user: Agent,
    examples: Sequence[Example],
    scene: Scene,
    *,
    seed: int,
    step: int,
    batch_size: int,
    name: str,
) -> list[dict[str, Any]]:
    """One conversation of an assistant with each example's user, as `transcripts` has them.

    Raises:
        RuntimeError: a partner off the device failed.
    """
    rows: list[dict[str, Any]] = []
    for chosen, batch in collect_batches(
        user,
        helper,
        examples,
        chat=scene.chat,
        limits=scene.limits,
        seed=seed,
        step=step,
        batch_size=batch_size,
        mesh=scene.compute.mesh.make(),
        name=name,
    ):
        rows += transcripts(placement.to_host(batch), scene.chat.decode)[: len(chosen)]
    return rows
