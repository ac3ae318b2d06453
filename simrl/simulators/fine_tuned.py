"""A simulator fine-tuned on people's turns (UserLM, arXiv:2510.06552; SFTUser of arXiv:2605.09808).

It writes in the natural view, under the user header, as in its training, and ends a conversation with the added
terminal token. Its system text is the one of its training rows: the intent, the data set, or the template's default.
"""

import dataclasses
from collections.abc import Callable

from simrl.conversations.chat import TERMINAL_TEXT, USER, Chat
from simrl.conversations.records import Conversation, Example
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, Resampling, System, model_agent
from simrl.rollouts.token_sampling import Sampling


@dataclasses.dataclass(frozen=True)
class FineTunedSettings:
    """Settings of a fine-tuned simulator."""

    # Temperature and top-p of arXiv:2605.09808.
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))


def told_intent(example: Example | Conversation) -> str:
    """The intent as the system text.

    Raises:
        ValueError: the example has none.
    """
    if example.intent is None:
        raise ValueError(f'example {example.id}: expected an intent, found none')
    return example.intent


def tuned_system(intent: bool, source_tag: bool) -> Callable[[Example | Conversation], str] | None:
    """The system text of a conversation in training, and of an example when the simulator is sampled.

    Args:
        intent: whether it has the intent, of which then none may be missing.
        source_tag: whether it has the data set's name: people of different data sets write in different ways.

    Returns:
        None if it has neither: the template's default stays.
    """
    if not (intent or source_tag):
        return None

    def system(record: Example | Conversation) -> str:
        tag = [f'source: {record.source}'] if source_tag else []
        return '\n'.join([*tag, *([told_intent(record)] if intent else [])])

    return system


def fine_tuned(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    max_new_tokens: int,
    settings: FineTunedSettings,
    system: System | None = None,
    resampling: Resampling | None = None,
) -> ModelAgent:
    """A model trained on users' turns as the user. Without an opening in the example it writes its own.

    Args:
        max_new_tokens: max tokens per message, end-of-turn included.
        system: an example -> the system text, as in the rows that the model was trained on. None: the template's
            default.
        resampling: of repeats; None: they stay.
    """
    return model_agent(
        chat,
        config,
        params,
        execution,
        role=USER,
        max_new_tokens=max_new_tokens,
        sampling=settings.sampling,
        system=system,
        stop_text=TERMINAL_TEXT,
        resampling=resampling,
    )
