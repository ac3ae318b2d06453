"""A simulator fine-tuned on people's turns (UserLM, arXiv:2510.06552; SFTUser of arXiv:2605.09808).

It speaks in the natural view, under the user header, as in its training, and ends a conversation with the added
terminal token. Its system text is what it was trained with: the intent, or the template's default.
"""

import dataclasses
from collections.abc import Callable

from simrl.conversations.chat import TERMINAL_TEXT, USER, Chat
from simrl.conversations.records import Example
from simrl.conversations.views import Rendered, natural_prompt
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, generation_spec
from simrl.rollouts.generate import Sampling


@dataclasses.dataclass(frozen=True)
class FineTunedSettings:
    """How a fine-tuned simulator is asked."""

    # Temperature and top-p of arXiv:2605.09808.
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))


def default_system(_: Example) -> str | None:
    """No system text but the template's own."""
    return None


def told_intent(example: Example) -> str:
    """The intent as the system text.

    Raises:
        ValueError: the example has none.
    """
    if example.intent is None:
        raise ValueError(f'example {example.id}: expected an intent, found none')
    return example.intent


def fine_tuned(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    max_new_tokens: int,
    settings: FineTunedSettings,
    system: Callable[[Example], str | None] = default_system,
) -> ModelAgent:
    """A model trained on users' turns as the user. Without an opening in the example it writes its own.

    Args:
        max_new_tokens: most tokens sampled for a message, its end-of-turn included.
        system: an example -> the system text, as in the rows that the model was trained on.
    """

    def prompt(example: Example) -> Rendered:
        return natural_prompt(chat, example.opening, system(example))

    spec = generation_spec(
        chat,
        config,
        execution,
        role=USER,
        swapped=False,
        max_new_tokens=max_new_tokens,
        sampling=settings.sampling,
        stop_sequences=((chat.terminal,),),
    )
    token_mask = chat.token_mask(config.padded_vocab_size, terminal=True, header='user')
    return ModelAgent(params, spec, settings.sampling.temperature, token_mask, prompt, TERMINAL_TEXT)
