"""A prompted simulator: the system message asks an instruction-tuned model to play the user.

It writes in the swapped view: under the assistant header, with the assistant's replies under the user header. It reads
the user's opening in its system text, or writes it: then all conversations of an example start from one opening.
"""

import dataclasses

from simrl.conversations.chat import USER, Chat
from simrl.conversations.records import Example
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.agents import ModelAgent, Opening, Resampling, System, model_agent
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators.person import Part
from simrl.simulators.prompts import INSTRUCTIONS, fill


@dataclasses.dataclass(frozen=True)
class RolePlaySettings:
    """Settings of a prompted simulator."""

    # Temperature and top-p of arXiv:2605.09808.
    sampling: Sampling = dataclasses.field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))
    signal: str = '[END]'  # the text by which it ends the conversation
    instructions: str = INSTRUCTIONS  # with the field {signal}, and {opening} or {person}

    def __post_init__(self) -> None:
        if '{signal}' not in self.instructions:
            raise ValueError('RolePlaySettings.instructions: expected the field {signal}, found none')
        if '{opening}' not in self.instructions and '{person}' not in self.instructions:
            raise ValueError('RolePlaySettings.instructions: expected the field {opening} or {person}, found neither')
        if not self.signal.strip():
            raise ValueError(f'RolePlaySettings.signal: expected some text, found {self.signal!r}')


def check_fields(instructions: str, opening: Opening, person: bool) -> None:
    """Refuses instructions without a field that is to be filled in, or with one for which there is nothing."""
    for field, needed in (('{opening}', opening == 'given'), ('{person}', person)):
        if (field in instructions) != needed:
            wanted, found = ('the', 'none') if needed else ('no', 'one')
            raise ValueError(f'instructions: expected {wanted} field {field}, found {found}')


def role_play_text(settings: RolePlaySettings, person: Part | None = None, opening: Opening = 'given') -> System:
    """An example -> the system text.

    Args:
        person: what is known of the person; None: nothing but the opening.
        opening: 'given' in the example, or 'written' by the simulator.

    Raises:
        ValueError: the instructions' fields are others; the returned function raises it for an example without a given
            opening.
    """
    check_fields(settings.instructions, opening, person is not None)

    def system(example: Example) -> str:
        values = {'signal': settings.signal}
        if person is not None:
            values['person'] = person(example)
        if opening == 'given':
            if example.opening is None:
                raise ValueError(f'example {example.id}: a role-playing simulator expects an opening, found none')
            values['opening'] = example.opening
        return fill(settings.instructions, **values)

    return system


def role_play(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    max_new_tokens: int,
    settings: RolePlaySettings,
    person: Part | None = None,
    opening: Opening = 'given',
    resampling: Resampling | None = None,
) -> ModelAgent:
    """A prompted model as the user.

    Args:
        max_new_tokens: max tokens per message, end-of-turn included.
        person, opening: see `role_play_text`.
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
        view='swapped',
        system=role_play_text(settings, person, opening),
        stop_text=settings.signal,
        opening=opening,
        resampling=resampling,
    )
