"""Behaviour of people in the concierge world: a person's next message, as a program.

The numbers are in `TABLE` of `people.py`, the words in `language.py`, the first assistant that people meet in
`scripted.py`, and satisfaction in `outcomes.py`. The world tests the experiment, because the truth about its people is
known. It is no evidence about real people.

**Intents.** Four attributes: food (6 values), price (3), area (4), time (4), each value equally likely. A person cares
about them with probability .9, .7, .7, .7, drawn again until at least two matter. The others are 'any'.

**Traits** are drawn independently for each person; `B(a, b)` is a Beta distribution:

    discloses B(1.2, 5), typos B(1, 5), typo_spread 1, synonyms B(2, 5), beside B(1.2, 5), patience .8 + 3.2 B(2, 2.5),
    tolerance B(2, 4), denies B(2, 4), corrects_more 0, remarks B(1, 6), polite B(2, 3), vague .25.

Stereotypes are the same program at extreme points: 'default' tells and corrects everything, never leaves and mistypes
nothing; 'impatient' has patience .8; 'typo' mistypes 70%, always with the first typo; 'vague' opens without an
attribute, and tells and corrects one at a time; 'rambler' gives unrelated answers to half of all questions and remarks
in 70%.

**Opening.** With probability `vague`, one of three openings without an attribute. Otherwise one attribute that matters,
drawn uniformly, and each other one that matters with probability `discloses`.

**Replies.** `read_assistant` parses the assistant's message, correct spellings only. The first rule that applies:

1. A proposal with nothing wrong is accepted with "ok|great|perfect thanks", which ends the conversation. An attribute
   that matters is wrong if the proposal names another value, two values or none.
2. A proposal with something right and n wrong attributes is accepted with probability `tolerance ** n`.
3. The message costs patience: a proposal .5 plus .5 per wrong attribute; a question .2, or 1 if all that it asks for
   was told before; an open question .3, or 1 if all that matters was told; chatter 1. At 0 or below the person leaves
   with "forget it", which ends the conversation.
4. One wrong attribute of a proposal, drawn uniformly, is corrected. If the proposal named a wrong value, the reply is
   "no not VALUE" with probability `denies`. Otherwise it is "no|um" and the wanted value, and each other wrong
   attribute is corrected with probability `corrects_more`.
5. With probability `beside`, the answer to a question is unrelated: one attribute that matters, was not asked for and
   not told before, drawn uniformly; without such an attribute, only a remark. Otherwise the first two attributes of the
   question are answered, by a value or "any ATTRIBUTE", and each other attribute that matters and was not told before
   with probability `discloses`.
6. The answer to an open question or chatter is one attribute that matters and was not told before, drawn uniformly, and
   each other such attribute with probability `discloses`. If all were told, all that matter are candidates.

**Wording.** Attributes are in random order, half of the time with "and" before the last of several. A value is replaced
by its synonym with probability `synonyms`. The word is mistyped with probability `typos`: as its first typo, or with
probability `typo_spread` as one of its three, drawn with .5, .3, .2. Half of the time "near" precedes an area and "for"
a time, unless they come first in the message. Half of the time "i want|i need|looking for" precedes the attributes (not
in corrections). An opening starts with a greeting with probability `polite`. Every message except a lone remark and the
last message ends with "please" with probability `polite`, and then has a remark with probability `remarks`.

**Randomness.** A message's draws depend on the person's id, a seed and the message's number. So a person's message is a
function of the messages before it, and every assistant meets the same draws.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

from simrl.worlds.concierge import language
from simrl.worlds.concierge.language import ANY, ATTRIBUTES, Act, Intent
from simrl.worlds.concierge.people import Person, Traits

TURNS = 5  # most messages of the assistant in a conversation
MOST_ANSWERED = 2  # most attributes of one question that are answered


@dataclasses.dataclass(frozen=True)
class Said:
    """A message of a person; `end` is set if it ends the conversation, by accepting a place or leaving."""

    text: str
    end: Literal['accepted', 'left'] | None = None


@dataclasses.dataclass(frozen=True)
class Mind:
    """State of a person: patience left, numbers of the attributes disclosed, number of messages said."""

    patience: float
    disclosed: frozenset[int]
    said: int


def speak(person: Person, heard: Sequence[str], seed: int) -> Said:
    """Returns a person's next message after these messages of an assistant, which may be any text.

    `speak(person, heard[:k], seed)` is the person's message before `heard[k]`. After a message that ends the
    conversation, the same message is returned.
    """
    mind, said = open_talk(person, seed)
    for text in heard:
        if said.end is not None:
            break
        mind, said = answer(person, mind, text, seed)
    return said


def open_talk(person: Person, seed: int) -> tuple[Mind, Said]:
    """Returns the opening and the person's state after it."""
    rng, traits = _draws(person, seed, 0), person.traits
    disclosed: list[int]
    greeting = (rng.choice(language.GREETINGS),) if rng.random() < traits.polite else ()
    if rng.random() < traits.vague:
        disclosed, text = [], rng.choice(language.VAGUE_OPENINGS)
    else:
        disclosed = _disclosed(traits, person.intent.cared, rng)
        text = _statement(person, disclosed, rng)
    text = ', '.join((*greeting, text))
    return Mind(traits.patience, frozenset(disclosed), 1), Said(_finished(traits, text, rng))


def answer(person: Person, mind: Mind, text: str, seed: int) -> tuple[Mind, Said]:
    """Returns the reply to an assistant's message and the person's state after it."""
    rng, traits, intent = _draws(person, seed, mind.said), person.traits, person.intent
    act = language.read_assistant(text)
    wrong = [number for number in intent.cared if act.values[number] != intent.values[number]]
    patience = mind.patience
    disclosed: list[int]
    if act.kind == 'propose' and _accepts(traits, len(wrong), len(intent.cared), rng):
        disclosed, said = [], Said(rng.choice(language.ACCEPTANCES), 'accepted')
    else:
        patience = round(patience - cost(act, intent, mind.disclosed), 9)  # rounded so that .8 - 4 x .2 is 0
        if patience <= 0:
            disclosed, said = [], Said(language.LEAVE, 'left')
        elif act.kind == 'propose':
            disclosed, said = _correct(person, act, wrong, rng)
        elif act.kind == 'ask':
            disclosed, said = _answer_question(person, act, mind.disclosed, rng)
        else:
            undisclosed = [number for number in intent.cared if number not in mind.disclosed]
            disclosed = _disclosed(traits, undisclosed or intent.cared, rng)
            said = Said(_finished(traits, _statement(person, disclosed, rng), rng))
    return Mind(patience, mind.disclosed | set(disclosed), mind.said + 1), said


def cost(act: Act, intent: Intent, disclosed: frozenset[int]) -> float:
    """Cost of an act, in patience, for a person who has disclosed these attributes."""
    if act.kind == 'propose':
        return 0.5 + 0.5 * sum(act.values[number] != intent.values[number] for number in intent.cared)
    if act.kind == 'ask':
        return 1.0 if disclosed.issuperset(act.asked) else 0.2
    if act.kind == 'open':
        return 1.0 if disclosed.issuperset(intent.cared) else 0.3
    return 1.0


def _accepts(traits: Traits, num_wrong: int, num_cared: int, rng: random.Random) -> bool:
    return not num_wrong or (num_wrong < num_cared and rng.random() < traits.tolerance**num_wrong)


def _correct(person: Person, act: Act, wrong: Sequence[int], rng: random.Random) -> tuple[list[int], Said]:
    """Returns the numbers of the attributes disclosed, and the message."""
    traits = person.traits
    first = rng.choice(wrong)
    named = act.values[first]
    if named is not None and rng.random() < traits.denies:
        return [], Said(_finished(traits, f'no not {_spelled(traits, named, rng)}', rng))
    disclosed = [first] + [number for number in wrong if number != first and rng.random() < traits.corrects_more]
    text = f'{rng.choice(language.CORRECTIONS)} {_listed(person, disclosed, rng)}'
    return disclosed, Said(_finished(traits, text, rng))


def _answer_question(person: Person, act: Act, before: frozenset[int], rng: random.Random) -> tuple[list[int], Said]:
    traits = person.traits
    others = [number for number in person.intent.cared if number not in before and number not in act.asked]
    if rng.random() < traits.beside:
        if not others:
            return [], Said(rng.choice(language.REMARKS))
        disclosed = [rng.choice(others)]
    else:
        disclosed = [*act.asked[:MOST_ANSWERED], *(number for number in others if rng.random() < traits.discloses)]
    return disclosed, Said(_finished(traits, _statement(person, disclosed, rng), rng))


def _draws(person: Person, seed: int, number: int) -> random.Random:
    return random.Random(f'{person.id} {seed} {number}')


def _disclosed(traits: Traits, candidates: Sequence[int], rng: random.Random) -> list[int]:
    """Draws one of the attributes, and each other one with probability `discloses`."""
    first = rng.choice(candidates)
    return [first] + [number for number in candidates if number != first and rng.random() < traits.discloses]


def _statement(person: Person, disclosed: Sequence[int], rng: random.Random) -> str:
    lead_in = f'{rng.choice(language.LEAD_INS)} ' if rng.random() < 0.5 else ''
    return lead_in + _listed(person, disclosed, rng)


def _listed(person: Person, disclosed: Sequence[int], rng: random.Random) -> str:
    """Words the attributes in random order: 'thai and near station', 'any price'."""
    items: list[str] = []
    for number in rng.sample(disclosed, len(disclosed)):
        value, attribute = person.intent.values[number], ATTRIBUTES[number]
        item = f'{ANY} {attribute.name}' if value == ANY else _spelled(person.traits, value, rng)
        if attribute.lead and value != ANY and items and rng.random() < 0.5:
            item = f'{attribute.lead} {item}'
        items.append(item)
    if len(items) > 1 and rng.random() < 0.5:
        items.insert(-1, 'and')
    return ' '.join(items)


def _spelled(traits: Traits, value: str, rng: random.Random) -> str:
    word = language.SYNONYM_OF[value] if rng.random() < traits.synonyms else value
    if rng.random() >= traits.typos:
        return word
    typos = language.TYPOS[word]
    return rng.choices(typos, language.TYPO_WEIGHTS)[0] if rng.random() < traits.typo_spread else typos[0]


def _finished(traits: Traits, text: str, rng: random.Random) -> str:
    if rng.random() < traits.polite:
        text += ' please'
    if rng.random() < traits.remarks:
        text += f', {rng.choice(language.REMARKS)}'
    return text
