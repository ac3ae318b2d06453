"""One conversation in an agent's view, message by message; a message's text can be read while it is sampled.

    view = view_of(agent, chat, example, seed=0)
    view.receive(chat.encode('Hello!'))
    for text in view.stream():
        print(text, end='', flush=True)

Tokens are those of a rollout with the same seed, example and messages: both run the same decode loop. Here it stops
every few tokens, to hand out their text. Repeats of a simulator stay: what was read cannot be taken back.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER, Chat
from simrl.conversations.records import Example
from simrl.models import transformer
from simrl.rollouts.agents import GenerationSpec, HostAgent, HostConversation, ModelAgent, OneAgent, Policy
from simrl.rollouts.compaction import without_caches
from simrl.rollouts.context import PREFIX, Context, extend, grow_cache
from simrl.rollouts.generate import Decoding, begin_message, decode, end_message
from simrl.rollouts.host import FailedReplyError, agent_seeds, encode_reply
from simrl.rollouts.state import example_hash, row_keys
from simrl.serving.text import AnswerText

BLOCK = 4  # tokens sampled between two pieces of text
CHUNK = 32  # given tokens that are fed at once
LEAST_CACHE = 512  # tokens; caches double from here on, as each size is a program to compile


class TooLongError(ValueError):
    """A conversation has more tokens than its model has positions, or than its sliding window."""


@dataclasses.dataclass(frozen=True)
class Sent:
    """A message that an agent has sent.

    Attributes:
        ids: its content, a stop sequence included; of a model behind an endpoint none.
        text: without the stop sequence.
        ends: whether it ends the conversation.
        truncated: whether it was cut: by its max tokens, the model's positions, or the reader who stopped it.
    """

    ids: tuple[int, ...]
    text: str
    ends: bool = False
    truncated: bool = False


class ModelView:
    """A conversation as an agent on the device sees it.

    Attributes:
        length: tokens so far.
        sent: the agent's last message; None before the first.
    """

    def __init__(self, agent: ModelAgent, chat: Chat, example: Example, *, seed: int, sample: int = 0) -> None:
        """Reads the agent's prompt.

        Args:
            agent: its params as `rollouts.collect.for_sampling` gives them.
            example: what the conversation starts from.
            seed, sample: with the example they decide every draw, as those of a rollout's step 0.

        Raises:
            TooLongError: the prompt has more tokens than the model has positions.
        """
        self._policy, self._spec, self._chat, self._stop_text = agent.policy, agent.policy.spec, chat, agent.stop_text
        self._max_tokens = self._spec.config.max_row_tokens
        self._row_keys = _row_keys(example, seed, sample)
        self._number = 0 if example.opening is None else 1  # of the next message
        self._context: Context | None = None
        self.length = 0
        self.sent: Sent | None = None
        prompt = agent.prompt(example)
        self._is_first = not np.any(prompt.message > PREFIX)  # whether no message precedes the next one
        self._check_room(len(prompt), 'the prompt')
        self._append(prompt.tokens, prompt.role, PREFIX)

    def receive(self, ids: Sequence[int]) -> None:
        """Appends a message of the partner, given as content ids.

        Raises:
            TooLongError: it has no room. The conversation is as before.
        """
        spec = self._spec
        header = spec.partner_first_header if self._is_first else spec.partner_header
        tokens = [*header, *ids, spec.partner_end_of_turn]
        self._check_room(self.length + len(tokens) + len(spec.own_header) + 2, 'this message and the shortest reply')
        partner = ASSISTANT if spec.role == USER else USER
        self._append(tokens, [TEMPLATE] * len(header) + [partner] * (len(ids) + 1), self._number)
        self._number, self._is_first = self._number + 1, False

    def stream(self) -> Generator[str, None, None]:
        """Samples the agent's next message; what it yields, joined, is the message's text.

        A reader that closes the iterator ends the message where it is.

        Raises:
            TooLongError: there is no room for a message.
        """
        policy, spec, number = self._policy, self._spec, np.array([self._number], np.int32)
        header = spec.own_first_header if self._is_first else spec.own_header
        self._check_room(self.length + len(header) + 2, 'the shortest message')
        self._append(header, [TEMPLATE] * len(header), self._number)
        assert self._context is not None
        room = self._max_tokens - self.length - 1  # the last token is an end-of-turn
        limit = spec.max_new_tokens + 1 if room > spec.max_new_tokens else room
        context, state = _begin(policy, self._context)
        # What follows a stop text waits for the end: it may be of other tokens than a stop sequence's.
        text = AnswerText(self._chat, stop=[self._stop_text] if self._stop_text else (), keep_special=True)
        ids, shown = list[int](), 0
        step, done, ends = 0, False, False
        try:
            while not done and step < limit:
                until = min(step + BLOCK, limit)
                cache = self._with_room(dataclasses.replace(context, cache=state.cache), self.length + until).cache
                state = _decode(
                    policy, dataclasses.replace(state, cache=cache), self._row_keys, number, np.int32(until)
                )
                fetched = jax.device_get((state.step, state.tokens[0], state.done[0], state.stopped[0]))
                step, tokens, done, ends = (x.tolist() for x in fetched)
                known, ids = len(ids), tokens[: step - (done and not ends)]
                piece = text.push(ids[known:])
                shown += len(piece)
                yield piece
            yield _whole(self._chat, ids, self._stop_text, ends)[shown:]
        finally:
            self._context, truncated = _end(policy, context, state, number)
            self.length = int(self._context.length[0])
            if not done:
                self._append([spec.end_of_turn], [TEMPLATE], self._number)
            self._number, self._is_first = self._number + 1, False
            whole = _whole(self._chat, ids, self._stop_text, ends)
            self.sent = Sent(tuple(ids), whole, ends, not done or bool(truncated[0]))

    def _append(self, tokens: Sequence[int] | np.ndarray, role: Sequence[int] | np.ndarray, number: int) -> None:
        """Appends given tokens of a message, `CHUNK` at a time: all lengths share one program."""
        rows = [np.asarray(x, np.int32)[None] for x in (tokens, role)]
        if self._context is None and rows[0].size:  # the first token is pending: nothing is computed
            self._context = _first_context(rows[0][:, :1], rows[1][:, :1], number, self._spec)
            rows = [x[:, 1:] for x in rows]
        for start in range(0, rows[0].shape[1], CHUNK):
            part = [x[:, start : start + CHUNK] for x in rows]
            count = part[0].shape[1]
            padded = [np.pad(x, ((0, 0), (0, CHUNK - count))) for x in part]
            assert self._context is not None
            context = self._with_room(self._context, self.length + start + 1 + count)
            numbers, counts = (np.array([x], np.int32) for x in (number, count))
            self._context = _extended(self._policy, context, *padded, numbers, counts)
        self.length = 0 if self._context is None else int(self._context.length[0])

    def _with_room(self, context: Context, tokens: int) -> Context:
        return grow_cache(context, min(max(LEAST_CACHE, 1 << (tokens - 1).bit_length()), self._max_tokens))

    def _check_room(self, needed: int, what: str) -> None:
        if needed > self._max_tokens:
            raise TooLongError(
                f"the conversation is too long: expected at most the model's {self._spec.config.row_limit} tokens, "
                f'found {needed} with {what}'
            )


class HostView:
    """A conversation as an agent off the device sees it; the same methods as of `ModelView`."""

    def __init__(
        self, agent: HostAgent, chat: Chat, example: Example, role: int, *, seed: int, sample: int = 0
    ) -> None:
        self._agent, self._chat, self._role = agent, chat, role
        self._seeds = np.asarray(agent_seeds(_row_keys(example, seed, sample)))
        opening = () if example.opening is None else (('user', example.opening),)
        self._conversation = HostConversation(example, sample, opening)
        self.sent: Sent | None = None

    def receive(self, ids: Sequence[int]) -> None:
        self._append(ASSISTANT if self._role == USER else USER, self._chat.decode(ids))

    def stream(self) -> Generator[str, None, None]:
        """Asks for the reply.

        Raises:
            RuntimeError: the agent failed.
        """
        (reply,) = self._agent.reply([self._conversation], self._seeds)
        try:
            ids, truncated = encode_reply(reply, self._chat, self._role, self._agent.max_new_tokens)
        except FailedReplyError as error:
            raise RuntimeError(f'the agent failed: {error}') from error
        text = self._chat.decode(ids[:-1] if reply.ends else ids)
        self._append(self._role, text)
        self.sent = Sent(tuple(ids), text, reply.ends, truncated)
        yield text

    def _append(self, role: int, text: str) -> None:
        messages = (*self._conversation.messages, ('user' if role == USER else 'assistant', text))
        self._conversation = dataclasses.replace(self._conversation, messages=messages)


View = ModelView | HostView


def view_of(agent: OneAgent, chat: Chat, example: Example, role: int, *, seed: int, sample: int = 0) -> View:
    """A conversation that starts from the example, as the agent in `role` (USER or ASSISTANT) sees it."""
    if isinstance(agent, HostAgent):
        return HostView(agent, chat, example, role, seed=seed, sample=sample)
    return ModelView(agent, chat, example, seed=seed, sample=sample)


def _whole(chat: Chat, ids: Sequence[int], stop_text: str, ends: bool) -> str:
    """The text of a message, without the stop text by which it `ends` the conversation."""
    text = chat.decode(ids)
    found = text.rfind(stop_text) if ends and stop_text else -1
    return text if found < 0 else text[:found]


def _row_keys(example: Example, seed: int, sample: int) -> jax.Array:
    number = jnp.array([example_hash(example.id)], jnp.uint32)
    return row_keys(seed, 0, number, jnp.array([sample]))


def _first_context(tokens: np.ndarray, role: np.ndarray, number: int, spec: GenerationSpec) -> Context:
    """A context of one token, which is pending, `[1, 1]` as its role."""
    pad = ((0, 0), (0, spec.config.max_positions - 1))
    return Context(
        tokens=jnp.pad(tokens, pad),
        role=jnp.pad(role.astype(np.int8), pad),
        message=jnp.pad(np.full((1, 1), number, np.int16), pad),
        log_prob=jnp.zeros((1, spec.config.max_positions), jnp.float32),
        length=jnp.ones(1, jnp.int32),
        cache=transformer.init_cache(spec.config, 1, min(LEAST_CACHE, spec.config.max_positions), spec.execution.dtype),
    )


@functools.partial(jax.jit, donate_argnames='context')
def _extended(
    policy: Policy, context: Context, tokens: jax.Array, role: jax.Array, number: jax.Array, count: jax.Array
) -> Context:
    return extend(policy, context, tokens, role, number, count)


@functools.partial(jax.jit, donate_argnames='context')
def _begin(policy: Policy, context: Context) -> tuple[Context, Decoding]:
    """The context without its cache, and the state of the decode loop, which has it."""
    return without_caches(context), begin_message(policy, context, jnp.ones(1, bool))


@functools.partial(jax.jit, donate_argnames='state')
def _decode(policy: Policy, state: Decoding, row_keys: jax.Array, number: jax.Array, until: jax.Array) -> Decoding:
    return decode(policy, state, jax.vmap(jax.random.fold_in)(row_keys, number), until)


@jax.jit
def _end(policy: Policy, context: Context, state: Decoding, number: jax.Array) -> tuple[Context, jax.Array]:
    """The context with what was sampled; and whether it was cut by its max tokens, bool `[1]`."""
    context, message = end_message(policy, context, state, jnp.ones(1, bool), number)
    return context, message.truncated
