"""A prompted simulator: the system message asks an instruction-tuned model to play the user.

It writes in the swapped view: under the assistant header, with the assistant's replies under the user header.
"""

import dataclasses

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, model_agent
from simrl.rollouts.token_sampling import Sampling

INSTRUCTIONS = """\
You play a person who is chatting with an AI assistant. What you see under the user's name are the assistant's \
replies; you write what the person types next. Write one short message in the person's own style, and nothing else. \
Never answer as an assistant would. When the person has what they came for, write {signal} and nothing else.

The person opened the conversation with this message:
{opening}"""


@dataclasses.dataclass(frozen=True)
class RolePlaySettings:
    """Settings of a prompted simulator."""

    # Temperature and top-p of arXiv:2605.09808.
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))
    signal: str = '[END]'  # the text by which it ends the conversation
    instructions: str = INSTRUCTIONS  # with the fields {signal} and {opening}

    def __post_init__(self) -> None:
        for field in ('{signal}', '{opening}'):
            if field not in self.instructions:
                raise ValueError(f'RolePlaySettings.instructions: expected the field {field}, found none')
        if not self.signal.strip():
            raise ValueError(f'RolePlaySettings.signal: expected some text, found {self.signal!r}')


def role_play(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    max_new_tokens: int,
    settings: RolePlaySettings,
) -> ModelAgent:
    """A prompted model as the user of examples with an opening.

    Args:
        max_new_tokens: max tokens per message, end-of-turn included.
    """

    def system(example: Example) -> str:
        if example.opening is None:
            raise ValueError(f'example {example.id}: a role-playing simulator expects an opening, found none')
        # Not str.format: an opening may hold braces of its own.
        return settings.instructions.replace('{signal}', settings.signal).replace('{opening}', example.opening)

    return model_agent(
        chat,
        config,
        params,
        execution,
        role=USER,
        max_new_tokens=max_new_tokens,
        sampling=settings.sampling,
        view='swapped',
        system=system,
        stop_text=settings.signal,
    )
