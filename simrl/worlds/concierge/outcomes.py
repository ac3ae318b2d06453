"""Outcomes of conversations and votes between them: functions of intent and transcript, equal for every assistant."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from simrl.worlds.concierge.language import ANY, ActKind, Intent, read_assistant, read_user, says_leave, words

Messages = Sequence[tuple[str, str]]  # role, content

EFFORT = 0.03  # cost in satisfaction of each assistant's message
VOTE_SCALE = 0.25 / math.log(9)  # in satisfaction; one more attribute of four wins nine times in ten


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a conversation.

    Attributes:
        satisfaction: share met (0 if the user left), less .03 per message of the assistant.
        share_met: share of the attributes that matter that the last proposal meets; 0 without a proposal. Two
            different values for an attribute do not meet it, or a proposal of all values would win.
        left, accepted: the user's way of ending the conversation; both False if the user did not end it.
        assistant_turns: number of messages of the assistant.
        first_act: kind of the assistant's first message; 'none' without one.
    """

    satisfaction: float
    share_met: float
    left: bool
    accepted: bool
    assistant_turns: int
    first_act: ActKind | Literal['none']


def outcome_of(intent: Intent, messages: Messages, ended: bool) -> Outcome:
    """Computes the outcome of a conversation for a person with this intent.

    Args:
        messages: all messages from the user's opening on, with any texts.
        ended: True if the user's last message ended the conversation; `says_leave` tells leaving from accepting.

    Raises:
        ValueError: a role other than 'user' or 'assistant', or `ended` but the last message is not the user's.
    """
    _check(messages, ended)
    acts = [read_assistant(text) for role, text in messages if role == 'assistant']
    share_met = 0.0
    for act in reversed(acts):
        if act.kind == 'propose':
            met = sum(act.values[number] == intent.values[number] for number in intent.cared)
            share_met = met / len(intent.cared)
            break
    left = ended and says_leave(messages[-1][1])
    return Outcome(
        satisfaction=(0.0 if left else share_met) - EFFORT * len(acts),
        share_met=share_met,
        left=left,
        accepted=ended and not left,
        assistant_turns=len(acts),
        first_act=acts[0].kind if acts else 'none',
    )


def vote(satisfaction: float, other: float) -> float:
    """Probability that a person prefers the first of two conversations, by satisfaction.

    It follows Luce's choice rule (Luce 1959, Individual Choice Behavior) on exp(satisfaction / scale). With the scale
    .25 / ln 9, one more attribute of four wins nine times in ten, and one message less 57 times in a hundred.
    """
    return 1 / (1 + math.exp((other - satisfaction) / VOTE_SCALE))


@dataclasses.dataclass(frozen=True)
class UserStatistics:
    """Counts over one conversation's user messages. Sums over conversations give rates.

    Attributes:
        messages: messages of the user.
        words: words in these messages.
        opening_attributes: attributes of which the opening names a value.
        values: words for values, clean or known typos; other misspellings are not recognised.
        mistyped: values that are typos.
        statements: values and 'any ATTRIBUTE', wanted or denied.
        against_intent: statements that contradict the intent: another value wanted, the right one denied, or 'any' for
            an attribute that matters.
        left, accepted: 1 if the user ended the conversation this way.
    """

    messages: int
    words: int
    opening_attributes: int
    values: int
    mistyped: int
    statements: int
    against_intent: int
    left: int
    accepted: int


def user_statistics(intent: Intent, messages: Messages, ended: bool) -> UserStatistics:
    """Counts the messages of a user with this intent; arguments and errors as in `outcome_of`."""
    _check(messages, ended)
    texts = [text for role, text in messages if role == 'user']
    statements = [statement for text in texts for statement in read_user(text)]
    values = [statement for statement in statements if statement.value != ANY]
    opening = {s.attribute for text in texts[:1] for s in read_user(text) if s.value != ANY and not s.denied}
    left = ended and says_leave(texts[-1])
    return UserStatistics(
        messages=len(texts),
        words=sum(len(words(text)) for text in texts),
        opening_attributes=len(opening),
        values=len(values),
        mistyped=sum(statement.mistyped for statement in values),
        statements=len(statements),
        against_intent=sum((s.value == intent.values[s.attribute]) == s.denied for s in statements),
        left=int(left),
        accepted=int(ended and not left),
    )


def _check(messages: Messages, ended: bool) -> None:
    for number, (role, _) in enumerate(messages):
        if role not in ('user', 'assistant'):
            raise ValueError(f"message {number}: expected role 'user' or 'assistant', found {role!r}")
    if ended and (not messages or messages[-1][0] != 'user'):
        found = messages[-1][0] if messages else 'no message'
        raise ValueError(f"a conversation that the user ended: expected the user's message last, found {found!r}")
