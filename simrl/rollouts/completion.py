"""Single replies of an assistant on the device: a `Complete` function of the model."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, Chat, EncodingError
from simrl.conversations.completion import Complete, Failed, NoText
from simrl.conversations.records import Example, Message
from simrl.conversations.views import Rendered, render
from simrl.rollouts.agents import Limits, ModelAgent, fitting, opening_only
from simrl.rollouts.collect import collect
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.trajectories import transcripts

STEP = 2**31 - 2  # in the keys of replies: no training run draws these numbers


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A reply. `truncated`: its max tokens cut it."""

    text: str
    truncated: bool


def complete(
    agent: ModelAgent, chat: Chat, *, prompt_tokens: int, batch_size: int, mesh: Mesh, seed: int = 0
) -> Complete:
    """`replies` as a `Complete` function, for which a reply that its max tokens cut is a failure."""
    sample = replies(agent, chat, prompt_tokens=prompt_tokens, batch_size=batch_size, mesh=mesh, seed=seed)

    def text(reply: Sampled | NoText) -> str | NoText:
        if isinstance(reply, NoText):
            return reply
        return NoText('length') if reply.truncated else reply.text

    def complete_all(chats: Sequence[Sequence[Message]], attempt: int) -> list[str | Failed]:
        return list(map(text, sample(chats, attempt)))

    return complete_all


def replies(
    agent: ModelAgent, chat: Chat, *, prompt_tokens: int, batch_size: int, mesh: Mesh, seed: int = 0
) -> Callable[[Sequence[Sequence[Message]], int], list[Sampled | NoText]]:
    """The function from chats, from a user's message to a user's message, and an attempt to the agent's replies.

    A reply depends on the chat, the seed and the attempt alone. A chat that is too long or cannot be encoded is a
    failure.

    Args:
        agent: an assistant, from `for_sampling`.
        prompt_tokens: max tokens of a chat, its template included.
        batch_size: replies sampled at once.

    Raises:
        ValueError: the model has too few positions.
    """
    limits = Limits(turns=1, prompt_tokens=prompt_tokens, assistant_tokens=agent.max_new_tokens, user_tokens=1)
    check_agents(opening_only(), agent, chat, limits)

    def example(messages: Sequence[Message]) -> Example:
        roles, texts = ([getattr(message, of) for message in messages] for of in ('role', 'content'))
        if len(roles) % 2 == 0 or roles != [('user', 'assistant')[i % 2] for i in range(len(roles))]:
            raise ValueError(f'expected chats that alternate from user to user, found {roles}')
        alone = texts[0].encode(errors='surrogatepass')
        whole = alone if len(texts) == 1 else b'\xff' + json.dumps(texts).encode()  # no text has this byte in UTF-8
        name = hashlib.sha256(whole).hexdigest()
        return Example(name, texts[-1], None, 0, 'prompt', 'train')

    def fault(example: Example, reader: ModelAgent) -> NoText | None:
        try:
            return None if fitting([example], [reader], chat, prompt_tokens)[0] else NoText('prompt too long')
        except EncodingError:
            return NoText('prompt not encodable')

    def sample(chats: Sequence[Sequence[Message]], attempt: int) -> list[Sampled | NoText]:
        examples = list(map(example, chats))
        long = {one.id: messages for one, messages in zip(examples, chats, strict=True) if len(messages) > 1}

        def prompt(example: Example) -> Rendered:
            if example.id not in long:
                return agent.prompt(example)
            return render(chat, long[example.id], system=None if agent.system is None else agent.system(example))

        reader = dataclasses.replace(agent, prompt=prompt)
        faults = [fault(one, reader) for one in examples]
        kept = list(dict.fromkeys(one for one, failed in zip(examples, faults, strict=True) if failed is None))
        found: dict[Example, Sampled] = {}
        for start in range(0, len(kept), batch_size):
            chosen = kept[start : start + batch_size]
            batch, _ = collect(
                opening_only(),
                reader,
                chosen,
                chat=chat,
                limits=limits,
                seed=seed,
                step=STEP - attempt,
                view=ASSISTANT,
                mesh=mesh,
                padding=batch_size - len(chosen),
            )
            for one, row in zip(chosen, transcripts(batch, chat.decode)[: len(chosen)], strict=True):
                reply = row['messages'][-1]
                found[one] = Sampled(reply['content'], reply['truncated'])
        return [found[one] if failed is None else failed for one, failed in zip(examples, faults, strict=True)]

    return sample
