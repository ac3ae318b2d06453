"""Rules for the replies of simulators off the device, the same for every kind of them.

1. The signal: a message that holds the signal's text ends the conversation, wherever it stands. The text before it is
   part of the record, and the assistant never reads it; the text after it is left out. On the device sampling stops
   at the signal, so that nothing follows it.
2. A reply that breaks its schema, leaks reasoning or speaks as the assistant is discarded and asked for again, at most
   so many times in a row; then the conversation has failed. No reply is edited, but for its outer white space.
3. With a rule for repeats, one of the simulator's last message word for word is asked for again, too, with a higher
   temperature; after the last try it stays.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from simrl.remote.answers import Answer, Failure, Outcome
from simrl.remote.requests import Request
from simrl.rollouts.agents import HostConversation, Reply

Call = Callable[[Sequence[Request]], Sequence[Outcome]]  # requests -> an outcome for each
ASKED_AGAIN = ('empty', 'invalid_json', 'schema', 'length')  # causes of failures that another answer may not have
REASONING = re.compile(r'</?think(ing)?>|</?reasoning>|"(current_answer|thought|response)"\s*:', re.IGNORECASE)
AS_ASSISTANT = re.compile(r'\s*(\[|<\|?|#+ *|\*\*)?((ai )?assistant|ai|chatbot)(\]|\|?>|\*\*)?\s*:', re.IGNORECASE)
REPEAT = 'repeats its last message'


@dataclasses.dataclass(frozen=True)
class Read:
    """A reply as it was read: with a `fault` it is asked for again, and `reply` is what stays after the last try."""

    reply: Reply | None
    fault: str = ''


def split_signal(text: str, signal: str) -> tuple[str, bool]:
    """The text before the signal, and whether there is one."""
    before, found, _ = text.partition(signal)
    return (before.strip(), True) if found else (text.strip(), False)


def read_message(text: str, signal: str, conversation: HostConversation, *, repeats: bool) -> Read:
    """Reads a simulator's message by the rules above; with `repeats` one is asked for again."""
    if REASONING.search(text):
        return Read(None, 'leaks reasoning')
    if AS_ASSISTANT.match(text):
        return Read(None, 'speaks as the assistant')
    content, ends = split_signal(text, signal)
    if not content and not ends:
        return Read(None, 'is empty')
    reply = Reply(content, ends=ends)
    own = [said for role, said in conversation.messages if role == 'user']
    if repeats and own and not ends and own[-1].strip() == content:
        return Read(reply, REPEAT)
    return Read(reply)


def ask(
    call: Call,
    request_of: Callable[[HostConversation, int, int], Request],
    read: Callable[[Answer, HostConversation], Read],
    tries: int,
) -> Callable[[Sequence[HostConversation], np.ndarray], list[Reply]]:
    """Makes the `reply` of a `HostAgent`.

    Args:
        call: sends requests. What it raises ends the run. Threads may call `reply` at once if they may call this.
        request_of: (conversation, seed, attempt) -> the request; equal arguments make an equal one.
        read: an answer -> a reply or its fault.
        tries: replies asked for in a row, at most.
    """

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        replies: dict[int, Reply] = {}
        faults: collections.Counter[str] = collections.Counter()
        last = dict[int, str]()
        waiting = list(range(len(conversations)))
        for attempt in range(tries):
            requests = [request_of(conversations[i], int(seeds[i]), attempt) for i in waiting]
            again = []
            for i, outcome in zip(waiting, call(requests), strict=True):
                found = _read(outcome, conversations[i], read)
                if found.reply is not None:
                    replies[i] = dataclasses.replace(found.reply, resamples=attempt)
                if found.fault:
                    faults[found.fault] += 1
                    last[i] = found.fault
                    again.append(i)
            waiting = again
            if not waiting:
                break
        if faults:
            counts = ', '.join(f'{fault}: {count}' for fault, count in sorted(faults.items()))
            print(f'simulator: replies asked for again: {counts}', flush=True)
        for i in waiting:
            failure = Reply('', failure=f'no usable reply in {tries} tries, the last: {last[i]}', resamples=tries)
            replies.setdefault(i, failure)
        return [replies[i] for i in range(len(conversations))]

    return reply


def _read(outcome: Outcome, conversation: HostConversation, read: Callable[[Answer, HostConversation], Read]) -> Read:
    if not isinstance(outcome, Failure):
        return read(outcome, conversation)
    if outcome.cause in ASKED_AGAIN:
        return Read(None, outcome.cause)
    return Read(Reply('', failure=str(outcome)))


def sample_of(seed: int, attempt: int) -> int:
    """The sample's number in the cache: conversations of a group, and tries, have different ones."""
    return seed * 64 + attempt


def server_seed(seed: int, attempt: int) -> int:
    """The seed that a server gets, which takes 31 bits."""
    return (seed + attempt * 0x9E3779B1) % 2**31
