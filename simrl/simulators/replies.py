"""Rules for the replies of simulators off the device, the same for every kind of them.

1. The signal: a message that holds the signal's text ends the conversation, wherever it stands. The text before it is
   part of the record, and the assistant never reads it; the text after it is left out. On the device sampling stops
   at the signal, so that nothing follows it.
2. A reply that breaks its schema, leaks reasoning or speaks as the assistant has a fault. It is discarded and asked for
   again, at most so many times for one message; then the conversation has failed. No reply is edited, but for its outer
   white space.
3. With a `Resampling`, one that repeats the simulator's last message word for word is discarded and asked for again,
   too, with a higher temperature. Repeats and faults have limits of their own. Once either is reached, or the endpoint
   fails, the last repeat stays.
4. A message that its server cut is a message, and marked as truncated.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Sequence

import numpy as np

from simrl.remote.answers import UNREADABLE, Answer, Failure, Outcome, reason_of
from simrl.remote.requests import Request
from simrl.rollouts.agents import HostConversation, Reply, Resampling
from simrl.rollouts.token_sampling import Sampling

Call = Callable[[Sequence[Request]], Sequence[Outcome]]  # requests -> an outcome for each
REASONING = re.compile(r'</?think(ing)?>|</?reasoning>', re.IGNORECASE)
FIELDS = re.compile(r'\s*(```(?:json)?\s*)?(?=\{\s*"(current_answer|thought|response)"\s*:\s*")')  # of JSON role-play
AS_ASSISTANT = re.compile(r'\s*(\[|<\|?|#+ *|\*\*)?((ai )?assistant|ai|chatbot)(\]|\|?>|\*\*)?\s*:', re.IGNORECASE)
REPEAT = 'repeats its last message'


@dataclasses.dataclass(frozen=True)
class Fault:
    """A reason to discard a reply and to ask again."""

    cause: str


Read = Reply | Fault


@dataclasses.dataclass(frozen=True)
class Draw:
    """Fields of a request that tell it from others for the same conversation.

    Attributes:
        sampling: warmer with each repeat.
        seed: of the server, which takes 31 bits.
        sample: in the cache: conversations of a group, and tries, have different ones.
    """

    sampling: Sampling
    seed: int
    sample: int


def split_signal(text: str, signal: str) -> tuple[str, bool]:
    """The text before the signal, and whether there is one."""
    before, found, _ = text.partition(signal)
    return (before.strip(), True) if found else (text.strip(), False)


def read_message(text: str, signal: str, *, truncated: bool = False) -> Read:
    """Reads a simulator's message by the rules above; `truncated`: the server cut it."""
    if REASONING.search(text):
        return Fault('leaks reasoning')
    if AS_ASSISTANT.match(text):
        return Fault('speaks as the assistant')
    content, ends = split_signal(text, signal)
    if not content and not ends:
        return Fault('is empty')
    return Reply(content, ends=ends, truncated=truncated and not ends)


def read_role_play(text: str, signal: str, *, truncated: bool = False) -> Read:
    """`read_message` for a model that plays the user: an object of JSON role-play is no message."""
    return Fault('leaks reasoning') if _is_object(text) else read_message(text, signal, truncated=truncated)


def _is_object(text: str) -> bool:
    """True if the text is an object with fields of JSON role-play, whole or broken, and nothing else."""
    start = FIELDS.match(text)
    if start is None:
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text, start.end())
    except (ValueError, RecursionError):
        return True
    return text[end:].strip() in ('', '```')


def repeats(reply: Reply, conversation: HostConversation) -> bool:
    """True if a user's reply that does not end the conversation is the user's last message."""
    own = [said for role, said in conversation.messages if role == 'user']
    return not reply.ends and reply.failure is None and bool(own) and own[-1].strip() == reply.text.strip()


def ask(
    call: Call,
    request_of: Callable[[HostConversation, Draw], Request | Reply],
    read: Callable[[Answer], Read],
    *,
    sampling: Sampling,
    tries: int,
    resampling: Resampling | None,
) -> Callable[[Sequence[HostConversation], np.ndarray], list[Reply]]:
    """Makes the `reply` of a `HostAgent`.

    Args:
        call: sends requests. What it raises ends the run. Threads may call `reply` at once if they may call this.
        request_of: makes a request, or the failed reply to a conversation that cannot be sent; equal arguments make an
            equal one.
        read: an answer -> a reply, or its fault.
        sampling: of the first try.
        tries: max replies with a fault for one message.
        resampling: of repeats; None: they stay.
    """

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        replies: dict[int, Reply] = {}  # a repeat until another reply takes its place
        asked, faults, repeated = (np.zeros(len(conversations), int) for _ in range(3))
        discarded, unanswered = collections.Counter[str](), dict[str, list[Failure]]()
        waiting = list(range(len(conversations)))
        while waiting:
            requests = dict[int, Request]()
            for i in waiting:
                draw = _draw(sampling, resampling, int(seeds[i]), int(asked[i]), int(repeated[i]))
                asked[i] += 1
                match request_of(conversations[i], draw):
                    case Reply() as failed:
                        replies[i] = failed
                    case request:
                        requests[i] = request
            again = []
            for i, outcome in zip(requests, call(list(requests.values())), strict=True):
                if isinstance(outcome, Failure) and outcome.cause not in UNREADABLE:
                    unanswered.setdefault(outcome.cause, []).append(outcome)
                match _read(outcome, read):
                    case Fault(cause):
                        discarded[cause] += 1
                        faults[i] += 1
                        if faults[i] < tries:
                            again.append(i)
                        else:
                            failure = f'no usable reply in {asked[i]} tries, the last: {cause}'
                            replies.setdefault(i, Reply('', failure=failure))
                    case found if found.failure is not None:
                        replies.setdefault(i, found)
                    case found:
                        replies[i] = found
                        if resampling is not None and repeats(found, conversations[i]):
                            if repeated[i] < resampling.tries:
                                discarded[REPEAT] += 1
                                again.append(i)
                            repeated[i] += 1
            waiting = again
        for failures in unanswered.values():
            print(f'simulator: calls without an answer: {len(failures)}, the first: {failures[0]}', flush=True)
        if discarded:
            counts = ', '.join(f'{cause}: {count}' for cause, count in sorted(discarded.items()))
            print(f'simulator: replies asked for again: {counts}', flush=True)
        return [dataclasses.replace(replies[i], resamples=int(asked[i]) - 1) for i in range(len(conversations))]

    return reply


def _read(outcome: Outcome, read: Callable[[Answer], Read]) -> Read:
    if not isinstance(outcome, Failure):
        return read(outcome)
    if outcome.cause in UNREADABLE:
        return Fault(outcome.cause)
    return Reply('', failure=reason_of(outcome))


def _draw(sampling: Sampling, resampling: Resampling | None, seed: int, attempt: int, repeated: int) -> Draw:
    """The draw of an attempt, counted from 0, after so many repeats."""
    if resampling is not None and repeated:
        temperature = resampling.temperature(sampling.temperature, repeated)
        sampling = dataclasses.replace(sampling, temperature=temperature)
    return Draw(sampling, (seed + attempt * 0x9E3779B1) % 2**31, seed * 64 + attempt)
