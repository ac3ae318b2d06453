"""People of the concierge world in an experiment: who wants what, people as an agent, what conversations were worth."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import TERMINAL_TEXT, Chat
from simrl.conversations.records import Conversation, End, Example, Message
from simrl.models import placement
from simrl.rewards.rewards import Rewards
from simrl.rollouts.agents import HostAgent, HostConversation, Limits, Reply
from simrl.rollouts.state import EndReason, example_hash
from simrl.rollouts.trajectories import Trajectories, transcript_of, transcripts
from simrl.simulators.fine_tuned import told_intent
from simrl.worlds.concierge.language import Intent
from simrl.worlds.concierge.outcomes import outcome_of, user_statistics
from simrl.worlds.concierge.people import World, person, person_of
from simrl.worlds.concierge.replies import speak
from simrl.worlds.concierge.scripted import SOURCE

ROLES = ('assistant', 'user')


def log_example(log: Conversation) -> Example:
    """The example that a logged conversation started from."""
    return Example(log.id, None, log.intent, example_hash(log.id), log.source, log.split)


def log_of(example: Example, row: Mapping[str, Any]) -> Conversation:
    """A conversation of `transcripts` as a collection would keep it, with the intent of who had it."""
    turns = tuple(Message(role, text) for role, text in spoken(row))  # type: ignore[arg-type]
    cut = [dataclasses.replace(t, truncated=m['truncated']) for t, m in zip(turns, row['messages'], strict=True)]
    end: End = 'natural' if ended(row) else 'cut'
    return Conversation(example.id, example.source, example.split, tuple(cut), end, example.intent)


def people_examples(world: World, split: str, numbers: Iterable[int]) -> list[Example]:
    """Examples of these people. The user opens, whoever plays it."""
    people = [person(world, split, number) for number in numbers]
    return [Example(p.id, None, p.intent.text, example_hash(p.id), SOURCE, split) for p in people]


def people_agent(world: World, limits: Limits) -> HostAgent:
    """The people themselves: each conversation is with the person whose id the example has."""
    person_called = functools.cache(functools.partial(person_of, world))

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        replies = []
        for conversation, seed in zip(conversations, seeds.tolist(), strict=True):
            heard = [text for role, text in conversation.messages if role == 'assistant']
            said = speak(person_called(conversation.example.id), heard, seed)
            replies.append(Reply(said.text, ends=said.end is not None))
        return replies

    return HostAgent(reply, max_new_tokens=limits.user_tokens)


def alike(people: HostAgent) -> HostAgent:
    """People whose draws depend on who they are alone: they reply alike in all conversations of an example."""

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> Sequence[Reply]:
        own = [example_hash(conversation.example.id) for conversation in conversations]
        return people.reply(conversations, np.array(own, np.uint32))

    return dataclasses.replace(people, reply=reply)


def intent_of(example: Example) -> Intent:
    return Intent.from_text(told_intent(example))


def spoken(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Messages of a conversation of `transcripts` as a person reads them: (role, text) without stop sequences."""
    return [(m['role'], m['content'].replace(TERMINAL_TEXT, '').strip()) for m in row['messages']]


def ended(row: Mapping[str, Any]) -> bool:
    """True if the user ended the conversation of `transcripts`."""
    return row['end_reason'] == EndReason.SIGNAL.name.lower()


def satisfaction(chat: Chat, examples: Sequence[Example]) -> Callable[[Trajectories], Rewards]:
    """The reward of every arm: satisfaction, a function of intent and transcript alone.

    Raises:
        ValueError: two examples have the same hash, by which rows name them.
    """
    intents = {example_hash(e.id): intent_of(e) for e in examples}
    if len(intents) < len(examples):
        raise ValueError(f'expected {len(examples)} examples with hashes of their own, found {len(intents)} hashes')

    def score(batch: Trajectories) -> Rewards:
        ids, transcript = placement.to_host((batch.example_id, transcript_of(batch)))
        rows = transcripts(transcript, chat.decode)
        outcomes = [outcome_of(intents[i], spoken(row), ended(row)) for i, row in zip(ids.tolist(), rows, strict=True)]

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


def outcomes(
    examples: Sequence[Example], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[Any]], Mapping[str, int]]:
    """Returns what each conversation was worth to whoever had it, in columns (see `Scene.outcomes`), and counts."""
    total: collections.Counter[str] = collections.Counter(conversations=len(rows))
    columns: dict[str, list[Any]] = {}
    for example, row in zip(examples, rows, strict=True):
        intent, messages, natural = intent_of(example), spoken(row), ended(row)
        outcome = dataclasses.asdict(outcome_of(intent, messages, natural))
        accepted, left = outcome.pop('accepted'), outcome.pop('left')
        cut = {role: sum(m['truncated'] for m in row['messages'] if m['role'] == role) for role in ROLES}
        found = {
            'score': outcome.pop('satisfaction'),
            'end': 'accepted' if accepted else 'left' if left else 'turns',
            'truncated': cut['assistant'],
            'assistant_tokens': sum(m['tokens'] for m in row['messages'] if m['role'] == 'assistant'),
            'user_truncated': cut['user'],
            **outcome,
        }
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
        total.update(dataclasses.asdict(user_statistics(intent, messages, natural)))
    return columns, dict(total)
