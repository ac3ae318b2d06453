"""Single replies of an assistant on the device: a `Complete` function of the model."""

import hashlib
from collections.abc import Sequence

from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, Chat, EncodingError
from simrl.conversations.completion import Complete, Failed, NoText
from simrl.conversations.records import Example, Message
from simrl.rollouts.agents import Limits, ModelAgent, fitting, opening_only
from simrl.rollouts.collect import collect
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.trajectories import transcripts

STEP = 2**31 - 2  # in the keys of replies: no training run draws these numbers


def complete(
    agent: ModelAgent, chat: Chat, *, prompt_tokens: int, batch_size: int, mesh: Mesh, seed: int = 0
) -> Complete:
    """The function from chats of one user message to the agent's replies.

    A reply depends on the prompt, the seed and the attempt alone. A prompt that is too long or cannot be encoded, and a
    reply that its max tokens cut, are failures.

    Args:
        agent: an assistant, from `for_sampling`.
        prompt_tokens: max tokens of a prompt, its template included.
        batch_size: replies sampled at once.

    Raises:
        ValueError: the model has too few positions.
    """
    limits = Limits(turns=1, prompt_tokens=prompt_tokens, assistant_tokens=agent.max_new_tokens, user_tokens=1)
    check_agents(opening_only(), agent, chat, limits)

    def example(messages: Sequence[Message]) -> Example:
        if [message.role for message in messages] != ['user']:
            raise ValueError(f'expected chats of one user message, found {[message.role for message in messages]}')
        text = messages[0].content
        name = hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()
        return Example(name, text, None, 0, 'prompt', 'train')

    def fault(example: Example) -> NoText | None:
        try:
            return None if fitting([example], [agent], chat, prompt_tokens)[0] else NoText('prompt too long')
        except EncodingError:
            return NoText('prompt not encodable')

    def complete_all(chats: Sequence[Sequence[Message]], attempt: int) -> list[str | Failed]:
        examples = list(map(example, chats))
        faults = list(map(fault, examples))
        kept = list(dict.fromkeys(one for one, failed in zip(examples, faults, strict=True) if failed is None))
        replies: dict[Example, str | Failed] = {}
        for start in range(0, len(kept), batch_size):
            chosen = kept[start : start + batch_size]
            batch, _ = collect(
                opening_only(),
                agent,
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
                replies[one] = NoText('length') if reply['truncated'] else reply['content']
        return [replies[one] if failed is None else failed for one, failed in zip(examples, faults, strict=True)]

    return complete_all
