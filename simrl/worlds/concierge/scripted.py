"""A scripted assistant of mixed quality, and the corpora of its conversations that models imitate.

It is one program with a table of kinds. For each message it

1. reads the user's message: values (typos too, in six conversations of ten), denied values, 'any ATTRIBUTE';
2. chatters with the kind's probability `chatters`;
3. forgets each known attribute, for this message, with probability `forgets`;
4. asks for `asks` attributes at once, drawn uniformly from the unknown ones that it asked for less than twice. If it
   knows none at all, it asks the open question half of the time, at most once;
5. otherwise proposes, per attribute: the known value; else the last proposed value if not denied; else a value drawn
   uniformly from those not denied.
"""

import dataclasses
import random
from collections.abc import Mapping

from simrl.conversations.records import Conversation, End, Message
from simrl.worlds.concierge import language, replies
from simrl.worlds.concierge.language import ANY, ATTRIBUTES
from simrl.worlds.concierge.people import PEOPLE, STEREOTYPES, Person, World, person, stereotyped

SOURCE = 'concierge'
READS_TYPOS = 0.6  # share of conversations in which it understands typos
MOST_ASKED = 2  # most questions for one attribute


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of scripted assistant.

    Attributes:
        share: share of the conversations in the corpora.
        asks: number of attributes asked for at once; 0 proposes immediately and guesses.
        chatters: probability of a message without effect.
        forgets: probability, per attribute and message, to ignore a known value.
    """

    share: float
    asks: int
    chatters: float = 0.0
    forgets: float = 0.0


KINDS: Mapping[str, Kind] = {
    'asker': Kind(share=0.25, asks=1),
    'eager': Kind(share=0.25, asks=0),
    'two_at_once': Kind(share=0.1, asks=2),
    'chatty': Kind(share=0.2, asks=1, chatters=0.4),
    'forgetful': Kind(share=0.2, asks=1, forgets=0.3),
}


@dataclasses.dataclass
class Notes:
    """State of a scripted assistant in a conversation, by the number of the attribute."""

    known: dict[int, str] = dataclasses.field(default_factory=dict)  # known values, or 'any'
    denied: dict[int, set[str]] = dataclasses.field(default_factory=lambda: {n: set() for n in range(len(ATTRIBUTES))})
    asked: dict[int, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(range(len(ATTRIBUTES)), 0)
    )  # counts
    proposed: dict[int, str] = dataclasses.field(default_factory=dict)
    asked_openly: bool = False


def scripted_conversation(
    user: Person, kind: str, seed: int, *, turns: int = replies.TURNS, identity: str, split: str = 'train'
) -> Conversation:
    """Simulates a conversation of a person with a kind of scripted assistant.

    It ends naturally, with the user's message, or is cut after `turns` messages of the assistant. Its intent is the
    user's, as text.

    Raises:
        ValueError: an unknown kind, or `turns` below 1.
    """
    if kind not in KINDS:
        raise ValueError(f'scripted assistant: expected one of {tuple(KINDS)}, found {kind!r}')
    if turns < 1:
        raise ValueError(f'turns of the scripted assistant: expected at least 1, found {turns}')
    rng = random.Random(f'scripted {user.id} {seed}')
    reads_typos = rng.random() < READS_TYPOS
    notes = Notes()
    mind, said = replies.open_talk(user, seed)
    messages = [Message('user', said.text)]
    for number in range(turns):
        _note(notes, said.text, reads_typos)
        text = _act(KINDS[kind], notes, rng)
        messages.append(Message('assistant', text))
        if number + 1 < turns:
            mind, said = replies.answer(user, mind, text, seed)
            messages.append(Message('user', said.text))
            if said.end is not None:
                break
    end: End = 'natural' if said.end is not None else 'cut'
    return Conversation(identity, SOURCE, split, tuple(messages), end, user.intent.text)


def assistant_corpus(world: World, num_conversations: int) -> list[Conversation]:
    """Conversations for the initial assistant: half with people, a quarter 'default', the rest any stereotype."""
    return [
        _corpus_conversation(world, 'assistant', number, people=1 / 2, default=1 / 4)[1]
        for number in range(num_conversations)
    ]


def base_user_corpus(world: World, num_conversations: int) -> list[Conversation]:
    """Conversations for the base user: a third by 'default', the rest by any stereotype; intents are 'NAME: INTENT'."""
    corpus = []
    for number in range(num_conversations):
        name, conversation = _corpus_conversation(world, 'base_user', number, people=0.0, default=1 / 3)
        corpus.append(dataclasses.replace(conversation, intent=f'{name}: {conversation.intent}'))
    return corpus


def _corpus_conversation(
    world: World, corpus: str, number: int, *, people: float, default: float
) -> tuple[str, Conversation]:
    """Simulates a conversation with a drawn user (train split) and kind; also returns the user's name."""
    rng = random.Random(f'{corpus} {world.seed} {number}')
    kind = rng.choices(tuple(KINDS), [kind.share for kind in KINDS.values()])[0]
    drawn = rng.random()
    if drawn < people:
        name, user = PEOPLE, person(world, 'train', number)
    else:
        name = 'default' if drawn < people + default else rng.choice(tuple(STEREOTYPES))
        user = stereotyped(world, name, 'train', number)
    return name, scripted_conversation(user, kind, number, identity=f'{corpus}/{user.id}/{kind}')


def _note(notes: Notes, text: str, reads_typos: bool) -> None:
    for statement in language.read_user(text):
        number, value = statement.attribute, statement.value
        if statement.mistyped and not reads_typos:
            continue
        if statement.denied:
            notes.denied[number].add(value)
            if notes.known.get(number) == value:
                del notes.known[number]
        else:
            notes.known[number] = value


def _act(kind: Kind, notes: Notes, rng: random.Random) -> str:
    if rng.random() < kind.chatters:
        return rng.choice(language.CHATTER)
    known = {number: value for number, value in notes.known.items() if rng.random() >= kind.forgets}
    open_to_ask = [n for n in range(len(ATTRIBUTES)) if n not in known and notes.asked[n] < MOST_ASKED]
    if kind.asks and open_to_ask:
        if not known and not notes.asked_openly and rng.random() < 0.5:
            notes.asked_openly = True
            return language.OPEN_QUESTION
        chosen = rng.sample(open_to_ask, min(kind.asks, len(open_to_ask)))
        for number in chosen:
            notes.asked[number] += 1
        return language.question(rng.choice(language.QUESTIONS), chosen)
    notes.proposed = {n: _proposed(notes, known.get(n, ANY), n, rng) for n in range(len(ATTRIBUTES))}
    return language.proposal(rng.choice(language.PROPOSALS), tuple(notes.proposed.values()))


def _proposed(notes: Notes, known: str, number: int, rng: random.Random) -> str:
    if known != ANY:
        return known
    allowed = [value for value in ATTRIBUTES[number].values if value not in notes.denied[number]]
    if notes.proposed.get(number) in allowed:
        return notes.proposed[number]
    return rng.choice(allowed)
