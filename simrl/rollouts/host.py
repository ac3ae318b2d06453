"""Replies of an agent off the device, as arrays: tokens are decoded for it, and its text is encoded.

Messages of the agent on the device are never encoded again, and nothing is prefilled twice: only the host agent's text
is fed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import HEADERS, Chat, EncodingError
from simrl.models import placement
from simrl.rollouts.agents import HostAgent, HostConversation, Reply
from simrl.rollouts.interleave import Threads
from simrl.rollouts.state import Status, Transcript, waiting_for

OnWait = Callable[[float], None]  # takes seconds
ROLE_NAMES = ('user', 'assistant')  # of even and odd messages
REASON_BYTES = 512  # of a failure's reason, where processes exchange them
SEED_STREAM = 2**32 - 1  # folded into a conversation's key for the host agent's seed; messages fold in their numbers


@flax.struct.dataclass
class HostMessage:
    """Messages of a host agent in B rows.

    Attributes:
        tokens: int32 `[B, max_new_tokens + 1]`, content, 0 after it.
        content_length: int32 `[B]`.
        replied: bool `[B]`, whether there is a message.
        ends, truncated, failed: bool `[B]`, False in rows that did not wait for one.
        resamples: int32 `[B]`, messages that the agent discarded before.
    """

    tokens: np.ndarray | jax.Array
    content_length: np.ndarray | jax.Array
    replied: np.ndarray | jax.Array
    ends: np.ndarray | jax.Array
    truncated: np.ndarray | jax.Array
    failed: np.ndarray | jax.Array
    resamples: np.ndarray | jax.Array


def no_message(rows: int, max_new_tokens: int) -> HostMessage:
    """No reply yet in any row, on the host."""
    return HostMessage(
        tokens=np.zeros((rows, max_new_tokens + 1), np.int32),
        **{name: np.zeros(rows, np.int32) for name in ('content_length', 'resamples')},
        **{name: np.zeros(rows, np.bool_) for name in ('replied', 'ends', 'truncated', 'failed')},
    )


@dataclasses.dataclass(eq=False)
class HostReplies:
    """A host agent in B conversations.

    Attributes:
        agent: who replies.
        conversations: what it has read of each conversation, by row; only new messages are decoded.
        row_keys: typed keys `[B]` of the conversations.
        chat: how its text is encoded.
        failures: by row, the reason why it failed.
        threads: what calls the agent as soon as it is asked. None: it is called once its replies are waited for.
        on_wait: called with the seconds of each wait for replies.
    """

    agent: HostAgent
    conversations: list[HostConversation]
    row_keys: jax.Array
    chat: Chat
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    threads: Threads | None = None
    on_wait: OnWait | None = None

    @property
    def max_new_tokens(self) -> int:
        return self.agent.max_new_tokens

    @functools.cached_property
    def seeds(self) -> np.ndarray:
        """uint32 `[B]`."""
        return np.asarray(placement.to_host(agent_seeds(self.row_keys)))

    def reply(self, transcript: Transcript, rows: np.ndarray, role: int) -> HostMessage:
        """`start`, then the wait."""
        return self.start(transcript, rows, role)()

    def start(self, transcript: Transcript, rows: np.ndarray, role: int) -> Callable[[], HostMessage]:
        """Asks for the agent's messages in the conversations that wait for `role`.

        A reply's text is encoded as it is. The end of a conversation is the terminal token after it, which the
        transcript holds as it does a simulator's. What is not text, or text that the tokenizer cannot encode, is a
        failure. For several processes see `HostAgent.asked`.

        Args:
            transcript: of A rows on the device.
            rows: int `[A]`, the index of each among all rows.

        Returns:
            A function that waits for the messages. It raises what the agent raises. All processes call such functions
            in the same order.
        """
        names = ('messages', 'message_length', 'num_messages', 'end_reason')
        messages, length, *status = placement.to_host([getattr(transcript, name) for name in names])
        waiting = waiting_for(Status(*status), role)
        return self.ask(messages, length, status[0], rows, role, np.flatnonzero(waiting))

    def ask(
        self,
        messages: np.ndarray,
        length: np.ndarray,
        num_messages: np.ndarray,
        rows: np.ndarray,
        role: int,
        waiting: np.ndarray | None = None,
    ) -> Callable[[], HostMessage]:
        """`start` of conversations on the host.

        Args:
            messages, length, num_messages: `[A, M, L]`, `[A, M]` and `[A]`, as in `Transcript`.
            waiting: int, the indices among A of the conversations that wait; None: all.
        """
        seeds = self.seeds  # of all processes: read before their ways part
        own = slice(jax.process_index(), None, jax.process_count()) if self._shares else slice(None)
        indices = (np.arange(len(rows)) if waiting is None else waiting)[own].tolist()
        contents = {
            int(rows[index]): [messages[index, i, : length[index, i]] for i in range(num_messages[index])]
            for index in indices
        }
        replies = functools.partial(self._replies, contents, seeds)
        wait = replies if self.threads is None else self.threads.start(replies)
        return functools.partial(self._finish, wait, rows, indices, role)

    @property
    def _shares(self) -> bool:
        """True if each process has other replies, and needs those of the others."""
        return self.agent.asked == 'share' and jax.process_count() > 1

    def _finish(
        self, wait: Callable[[], Sequence[Reply]], rows: np.ndarray, indices: Sequence[int], role: int
    ) -> HostMessage:
        """Waits for the replies to the conversations at `indices` of `rows`, and encodes them."""
        started = time.monotonic()
        message = no_message(len(rows), self.max_new_tokens)
        failures, error = {}, None
        try:
            for index, reply in zip(indices, wait(), strict=True):
                failure = self._write(message, index, reply, role)
                if failure is not None:
                    message.failed[index] = True
                    failures[index] = failure
        except Exception as found:
            if not self._shares:
                raise
            error = found
        if self._shares:
            message, failures = _exchanged(message, failures, error)
        self.failures |= {int(rows[index]): failure for index, failure in failures.items()}
        if self.on_wait is not None:
            self.on_wait(time.monotonic() - started)
        return message

    def _replies(self, contents: Mapping[int, list[np.ndarray]], seeds: np.ndarray) -> Sequence[Reply]:
        """The agent's replies to conversations, by row with the ids of all their messages."""
        asked = list(contents)
        if not asked:
            return []
        for row in asked:
            self._read(row, contents[row])
        replies = self.agent.reply([self.conversations[row] for row in asked], seeds[asked])
        if len(replies) != len(asked):
            raise ValueError(f'HostAgent.reply: expected {len(asked)} replies, found {len(replies)}')
        return replies

    def _read(self, row: int, contents: list[np.ndarray]) -> None:
        """Decodes the messages since the agent last read the conversation."""
        conversation = self.conversations[row]
        read = len(conversation.messages)
        new = [
            (ROLE_NAMES[number % 2], self.chat.decode(ids.tolist()))
            for number, ids in enumerate(contents[read:], start=read)
        ]
        self.conversations[row] = dataclasses.replace(conversation, messages=(*conversation.messages, *new))

    def _write(self, message: HostMessage, index: int, reply: Reply, role: int) -> str | None:
        """Writes a reply into its row of a message, or returns why there is none."""
        try:
            content, truncated = encode_reply(reply, self.chat, role, self.max_new_tokens)
        except FailedReplyError as error:
            message.resamples[index] = reply.resamples
            return str(error)
        message.tokens[index, : len(content)] = content
        message.content_length[index] = len(content)
        message.replied[index] = True
        message.ends[index] = reply.ends
        message.truncated[index] = truncated
        message.resamples[index] = reply.resamples
        return None


def _exchanged(
    message: HostMessage, failures: Mapping[int, str], error: Exception | None
) -> tuple[HostMessage, dict[int, str]]:
    """The messages and failures of all processes, in each of them; every row is that of one.

    Raises:
        RuntimeError: the agent raised an error in some process, which would else leave the others waiting.
    """
    from jax.experimental import multihost_utils

    texts = np.zeros((len(message.failed) + 1, REASON_BYTES), np.uint8)
    reasons = dict(failures) if error is None else {**failures, len(message.failed): f'{type(error).__name__}: {error}'}
    for row, reason in reasons.items():
        encoded = reason.encode(errors='backslashreplace')[:REASON_BYTES]
        texts[row, : len(encoded)] = list(encoded)
    message, texts = multihost_utils.process_allgather((message, texts))
    message = jax.tree.map(lambda x: x.any(axis=0) if x.dtype == np.bool_ else x.sum(axis=0, dtype=x.dtype), message)
    first = np.argmax(texts.any(axis=-1), axis=0)  # the process that has a row's reason
    read = [bytes(texts[p, row]).rstrip(b'\0').decode(errors='ignore') for row, p in enumerate(first.tolist())]
    if read[-1]:
        raise RuntimeError(f'HostAgent.reply: an error in a process of {jax.process_count()}: {read[-1]}') from error
    return message, {row: read[row] for row in np.flatnonzero(message.failed).tolist()}


class FailedReplyError(ValueError):
    """A host agent's reply is a failure, no text, or text that the tokenizer cannot encode; the reason is printable."""


def encode_reply(reply: Reply, chat: Chat, role: int, max_new_tokens: int) -> tuple[list[int], bool]:
    """A host agent's message as a model would have sampled it, and whether it was cut, by the agent or here.

    The limit here counts an end of its own.

    Args:
        role: USER or ASSISTANT, who replies.

    Raises:
        FailedReplyError: there is no message.
        TypeError: it is no `Reply`.
    """
    if not isinstance(reply, Reply):
        raise TypeError(f'HostAgent.reply: expected a list of Reply, found {type(reply).__name__}: {reply!r:.80}')
    if reply.failure is not None:
        raise FailedReplyError(str(reply.failure).encode(errors='backslashreplace').decode())
    if not isinstance(reply.text, str):
        raise FailedReplyError(f'expected text, found {reply.text!r:.80}')
    try:
        ids = chat.encode(reply.text, HEADERS[role])
    except EncodingError as error:
        raise FailedReplyError(error.reason) from error
    except ValueError as error:
        raise FailedReplyError(str(error)) from error
    content = [*ids[: max_new_tokens - 1], chat.terminal] if reply.ends else ids[:max_new_tokens]
    return content, reply.truncated or len(ids) >= max_new_tokens


@jax.jit
def agent_seeds(row_keys: jax.Array) -> jax.Array:
    """The seeds of a host agent, uint32 `[B]`, by its conversations' keys."""
    streams = jax.vmap(jax.random.fold_in, (0, None))(row_keys, np.uint32(SEED_STREAM))
    return jax.vmap(functools.partial(jax.random.bits, dtype=jnp.uint32))(streams)
