"""What a conversation was worth, as a function of the intent and the transcript alone, the same for every assistant."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from simrl.worlds.concierge.language import ANY, ActKind, Intent, read_assistant, read_user, says_leave, words

Messages = Sequence[tuple[str, str]]  # role, content

EFFORT = 0.03  # satisfaction that an assistant's turn costs
VOTE_SCALE = 0.25 / math.log(9)  # one attribute of four more is preferred nine times in ten


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a conversation came out.

    Attributes:
        satisfaction: the share met, 0 where the user left, less .03 for each turn of the assistant.
        share_met: of the attributes that matter, by the last proposal; 0 without one. An attribute of which one
            proposal names two different values is not met: else naming all would win.
        left, accepted: how the user ended it; neither where the user did not.
        assistant_turns: messages of the assistant.
        first_act: what the assistant's first message does; 'none' without one.
    """

    satisfaction: float
    share_met: float
    left: bool
    accepted: bool
    assistant_turns: int
    first_act: ActKind | Literal['none']


def outcome_of(intent: Intent, messages: Messages, ended: bool) -> Outcome:
    """The outcome of a conversation for someone with this intent.

    Args:
        messages: from the user's opening on. Texts may be anything.
        ended: the last message is the user's and ended it; it left or accepted as `says_leave` reads it.

    Raises:
        ValueError: a role is neither 'user' nor 'assistant', or it ended with another's message than the user's.
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
    """The probability that a person prefers the first of two conversations, by their satisfaction.

    It is Luce's choice rule (Luce 1959, Individual Choice Behavior) on exp(satisfaction / scale). The scale is
    .25 / ln 9: one whole attribute of four more wins nine times in ten, one turn less 57 times in a hundred.
    """
    return 1 / (1 + math.exp((other - satisfaction) / VOTE_SCALE))


@dataclasses.dataclass(frozen=True)
class UserStatistics:
    """Counts of one conversation's user messages; sums of them over conversations make rates.

    Attributes:
        messages: of the user.
        words: in them.
        opening_attributes: different attributes that the opening names values of.
        values: words for values, clean or one of the known typos (other misspellings are not seen).
        mistyped: those that are typos.
        statements: values and 'any ATTRIBUTE', wanted or denied.
        against_intent: those that the intent does not hold: another value wanted, the right one denied, 'any' where
            it matters.
        left, accepted: 1 where the user ended so.
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
    """How a user with this intent talked; arguments and errors as of `outcome_of`."""
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
