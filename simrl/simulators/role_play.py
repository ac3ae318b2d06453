"""A prompted simulator: an instruction-tuned model is told, in the system message, to play the user.

It speaks in the swapped view: under the assistant header, with the assistant's replies under the user header.
"""

import dataclasses

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.conversations.views import Rendered, swapped_prompt
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, generation_spec
from simrl.rollouts.generate import Sampling

INSTRUCTIONS = """\
You play a person who is chatting with an AI assistant. What you see under the user's name are the assistant's \
replies; you write what the person types next. Write one short message in the person's own style, and nothing else. \
Never answer as an assistant would. When the person has what they came for, write {signal} and nothing else.

The person opened the conversation with this message:
{opening}"""


@dataclasses.dataclass(frozen=True)
class RolePlaySettings:
    """How a model is told to play the user."""

    # Temperature and top-p of arXiv:2605.09808.
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))
    signal: str = '[END]'  # what it writes to end the conversation
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
        max_new_tokens: most tokens sampled for a message, its end-of-turn included.
    """

    def prompt(example: Example) -> Rendered:
        if example.opening is None:
            raise ValueError(f'example {example.id}: a role-playing simulator expects an opening, found none')
        # Not str.format: an opening may hold braces of its own.
        text = settings.instructions.replace('{signal}', settings.signal).replace('{opening}', example.opening)
        return swapped_prompt(chat, text)

    runs = chat.terminal_runs(settings.signal)
    signals = tuple(run for run in runs if len(run) <= max_new_tokens)  # a longer one cannot be said
    if not signals:
        raise ValueError(
            f'RolePlaySettings.signal: {settings.signal!r} takes at least {min(map(len, runs))} tokens, expected at '
            f'most the {max_new_tokens} of a message'
        )
    spec = generation_spec(
        chat,
        config,
        execution,
        role=USER,
        swapped=True,
        max_new_tokens=max_new_tokens,
        sampling=settings.sampling,
        stop_sequences=signals,
    )
    # It speaks under the assistant's header, so it is the end of the assistant's turns that it may sample.
    token_mask = chat.token_mask(config.padded_vocab_size, terminal=False, header='assistant')
    return ModelAgent(params, spec, settings.sampling.temperature, token_mask, prompt, settings.signal)
