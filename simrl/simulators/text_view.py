"""A conversation in text as the tokens of one agent's view, and a model on the device that is met through its texts.

Such a model may have another tokenizer than its partner: its messages are decoded by its own, and encoded by the
partner's. With equal tokenizers, keys and texts it says the same tokens as in a rollout on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, ROLE_CODES, TEMPLATE, USER, Chat, EncodingError, Header
from simrl.models import placement
from simrl.models.cache import extended
from simrl.rollouts.agents import HostAgent, HostConversation, ModelAgent, Policy, Reply
from simrl.rollouts.context import PREFIX, cache_capacities, prefill
from simrl.rollouts.generate import generate
from simrl.simulators.replies import repeats

Keys = Callable[[Sequence[HostConversation], np.ndarray], jax.Array]  # conversations and seeds -> typed keys `[B]`


@dataclasses.dataclass(frozen=True, eq=False)
class TextView:
    """A conversation up to the agent's next content, in its own view.

    Attributes:
        tokens, role, message: as in `Context`, of one row.
        number: of the next message.
    """

    tokens: list[int]
    role: list[int]
    message: list[int]
    number: int


def text_view(agent: ModelAgent, chat: Chat, conversation: HostConversation) -> TextView:
    """The agent's prompt, all messages, and the header of its next one.

    Args:
        agent: its parameters are not read.
        chat: its own.
    """
    spec = agent.policy.spec
    prompt = agent.prompt(conversation.example)
    view = TextView(prompt.tokens.tolist(), prompt.role.tolist(), prompt.message.tolist(), len(conversation.messages))
    # An opening that the example gives is in the prompt: as a message, or in the system text.
    first = conversation.example.opening is not None and agent.opening == 'given'
    swapped = spec.own_header != chat.header(_header(spec.role))

    def append(number: int, speaker: int, text: str | None) -> None:
        own, is_first = speaker == spec.role, not view.message or view.message[-1] == PREFIX
        headers = (spec.own_first_header, spec.own_header) if own else (spec.partner_first_header, spec.partner_header)
        header = headers[0] if is_first else headers[1]
        content: list[int] = []
        if text is not None:
            place = _header(speaker if not swapped else _other(speaker))
            ids = chat.encode(text, 'first' if is_first and agent.system is not None else place)
            content = [*ids, spec.end_of_turn if own else spec.partner_end_of_turn]
        view.tokens.extend((*header, *content))
        view.role.extend([TEMPLATE] * len(header) + [speaker] * len(content))
        view.message.extend([number] * (len(header) + len(content)))

    for number, (name, text) in enumerate(conversation.messages):
        if number >= first:
            append(number, ROLE_CODES['user' if name == 'user' else 'assistant'], text)
    append(view.number, spec.role, None)
    return view


def _header(role: int) -> Header:
    return 'user' if role == USER else 'assistant'


def _other(role: int) -> int:
    return ASSISTANT if role == USER else USER


def keys_of_seeds(conversations: Sequence[HostConversation], seeds: np.ndarray) -> jax.Array:
    """A key for each conversation's seed."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def text_agent(agent: ModelAgent, chat: Chat, mesh: Mesh, *, keys: Keys = keys_of_seeds) -> HostAgent:
    """A user on the device that is met through its texts.

    It ends a conversation with its own signal, and writes repeats again, as on the device. Of several processes all
    sample all messages together: it may be too large for the devices of one.

    Args:
        agent: from `for_sampling`.
        chat: its own.
        mesh: of its parameters.
        keys: of conversations, equal in all processes; token i of message m is drawn with m and i folded in.
    """

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        row_keys = np.asarray(jax.random.key_data(keys(conversations, seeds)))
        views: dict[int, TextView] = {}
        replies: dict[int, Reply] = {}
        for i, conversation in enumerate(conversations):
            try:
                views[i] = text_view(agent, chat, conversation)
            except EncodingError as error:  # a text of its partner, or of the person
                replies[i] = Reply('', failure=error.reason)
        waiting = list(views)
        rule, usual = agent.resampling, float(agent.policy.temperature)
        for attempt in range(1 + (0 if rule is None else rule.tries)):
            if not waiting:
                break
            temperature = usual if rule is None or not attempt else rule.temperature(usual, attempt)
            found = _sample(
                agent,
                chat,
                mesh,
                [views[i] for i in waiting],
                row_keys[np.array(waiting)],
                attempt,
                temperature,
            )
            again = []
            for i, one in zip(waiting, found, strict=True):
                replies[i] = dataclasses.replace(one, resamples=attempt)
                if repeats(one, conversations[i]):
                    again.append(i)
            waiting = again
        return [replies[i] for i in range(len(conversations))]

    return HostAgent(
        reply,
        agent.max_new_tokens,
        stop_text=agent.stop_text,
        system=agent.system,
        opening=agent.opening,
        replayable=True,
        asked='all',
    )


def check_positions(agent: ModelAgent, prompt_tokens: int) -> None:
    """Refuses a model with too few positions for a prompt and one message after it.

    Its partner's messages are other tokens here, so no more is known. A conversation that outgrows the model fails.
    """
    spec = agent.policy.spec
    needed = prompt_tokens + len(spec.own_first_header) + spec.max_new_tokens + 1
    if needed > spec.config.max_row_tokens:
        raise ValueError(
            f'user: expected a prompt of {prompt_tokens} tokens and a message of {spec.max_new_tokens} in '
            f'{spec.config.row_limit} tokens, found that they take {needed}'
        )


def _sample(
    agent: ModelAgent,
    chat: Chat,
    mesh: Mesh,
    views: Sequence[TextView],
    row_keys: np.ndarray,
    attempt: int,
    temperature: float,
) -> list[Reply]:
    """One message in each conversation; `row_keys` are key data."""
    spec = agent.policy.spec
    room = spec.config.max_row_tokens - spec.max_new_tokens - 1
    fits = [len(view.tokens) <= room for view in views]
    longest = max((len(view.tokens) for view, fit in zip(views, fits, strict=True) if fit), default=1)
    width = next(size for size in cache_capacities(room) if size >= longest)
    rows = 1 << (len(views) - 1).bit_length()  # few sizes, as each is a program to compile
    rows += -rows % mesh.shape['data']

    def padded(field: str, dtype: str) -> np.ndarray:
        out = np.zeros((rows, width), dtype)
        for row, (view, fit) in enumerate(zip(views, fits, strict=True)):
            values = getattr(view, field)
            out[row, : len(values) if fit else 0] = values if fit else []
        return out

    active = np.zeros(rows, np.bool_)
    active[: len(views)] = fits
    number = np.zeros(rows, np.int32)
    number[: len(views)] = [view.number for view in views]
    length = np.zeros(rows, np.int32)
    length[: len(views)] = [len(view.tokens) if fit else 0 for view, fit in zip(views, fits, strict=True)]
    index = np.minimum(np.arange(rows), len(views) - 1)
    policy = dataclasses.replace(agent.policy, temperature=jnp.float32(temperature))
    arrays = (padded('tokens', 'int32'), padded('role', 'int8'), padded('message', 'int16'), length)
    with jax.set_mesh(mesh):
        rows_of = placement.shard_batch((*arrays, row_keys[index], number, active), mesh)
        sampled = generated(policy, *rows_of, np.uint32(-attempt % 2**32))
        tokens, content_length, stopped, truncated = placement.to_host(sampled)
    replies = []
    for row, fit in enumerate(fits):
        if not fit:
            replies.append(Reply('', failure=f'a conversation of more than {room} tokens'))
            continue
        text = chat.decode(tokens[row, : content_length[row]].tolist())
        ends = bool(stopped[row])
        text = text.partition(agent.stop_text)[0] if ends else text
        replies.append(Reply(text, ends=ends, truncated=bool(truncated[row])))
    return replies


@jax.jit
def generated(
    policy: Policy,
    tokens: jax.Array,
    role: jax.Array,
    message: jax.Array,
    length: jax.Array,
    row_keys: jax.Array,
    number: jax.Array,
    active: jax.Array,
    attempt: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A message's content ids, their number, and whether a stop sequence ended it or its budget cut it.

    Inactive rows have none. `row_keys`: key data. `attempt`: 0, or what a resample folds into its keys.
    """
    capacity = tokens.shape[1] + policy.spec.max_new_tokens + 1
    context = prefill(policy, tokens, role, message, length, capacity=capacity)
    context = dataclasses.replace(context, cache=extended(context.cache, capacity))
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(row_keys), number)
    again = jax.vmap(jax.random.fold_in, (0, None))(keys, attempt)
    keys = jax.random.wrap_key_data(jnp.where(attempt == 0, jax.random.key_data(keys), jax.random.key_data(again)))
    _, sampled = generate(policy, context, keys, active, number)
    return sampled.tokens, sampled.content_length, sampled.stopped, sampled.truncated
