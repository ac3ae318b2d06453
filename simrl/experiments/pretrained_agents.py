"""The agents of pretrained models: the assistant and the simulators of `conversation`, from settings and a model.

Parameters may be `{}`: such an agent has prompts, which checks read, and cannot speak.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from simrl.conversations.chat import Chat
from simrl.conversations.records import Conversation, Example
from simrl.experiments.pretrained_settings import Dtype, PretrainedSettings, PretrainedSimulator
from simrl.experiments.sources import Model
from simrl.models.transformer import Execution, Params
from simrl.rollouts.agents import HostAgent, ModelAgent, assistant
from simrl.run.config import ConfigError
from simrl.simulators.fine_tuned import fine_tuned, tuned_system
from simrl.simulators.person import (
    Part,
    Spoken,
    about,
    draw,
    few_shot_part,
    guideline_part,
    intent_part,
    persona_part,
    read_personas,
)
from simrl.simulators.remote import chat_simulator, json_simulator, raw_simulator
from simrl.simulators.replies import Call
from simrl.simulators.role_play import RolePlaySettings, role_play


def assistant_agent(settings: PretrainedSettings, model: Model, params: Params) -> ModelAgent:
    """The model as an assistant: the template's default system text, and the opening."""
    return assistant(
        model.chat,
        model.config,
        params,
        settings.compute.sampling,
        max_new_tokens=settings.conversation.limits.assistant_tokens,
        sampling=settings.conversation.assistant,
    )


def simulator_agent(
    settings: PretrainedSettings, arm: str, model: Model, params: Params, people: Sequence[Spoken]
) -> ModelAgent:
    """An arm's simulator, which is not one of the user's own.

    Args:
        people: whose messages a few-shot prompt shows.

    Raises:
        ConfigError: the model cannot be this simulator.
    """
    own = settings.arms[arm]
    try:
        if own.simulator == 'role_play':
            return _role_play(settings, model, params, own, settings.role_play(arm), people)
        return _fine_tuned(settings, model, params, own)
    except ValueError as error:
        raise ConfigError(f'config.arms.{arm}: {error}') from error


def usual_agents(settings: PretrainedSettings, model: Model) -> list[ModelAgent]:
    """The assistant and the simulators of `conversation`, without weights: those whose prompts openings must fit.

    Raises:
        ConfigError: the model cannot role-play under `conversation.role_play`.
    """
    agents = [assistant_agent(settings, model, {})]
    if model.chat.ends('user'):
        agents.append(_fine_tuned(settings, model, {}, PretrainedSimulator('fine_tuned')))
    if model.chat.system_header is None:
        return agents
    usual = settings.conversation.role_play
    try:
        return [*agents, _role_play(settings, model, {}, PretrainedSimulator('role_play'), usual, ())]
    except ValueError as error:
        raise ConfigError(f'config.conversation.role_play: {error}') from error


def mixture_of(weights: Mapping[str, float]) -> Callable[[Example], int]:
    """An example -> the number of its simulator, drawn by its seed with these weights."""
    ends = np.cumsum(list(weights.values())) / sum(weights.values())

    def choose(example: Example) -> int:
        place = draw(example.persona_seed, 'mixture', 2**32) / 2**32
        return min(int(np.searchsorted(ends, place, side='right')), len(ends) - 1)

    return choose


def remote_agent(
    settings: PretrainedSettings, arm: str, model: Model, people: Sequence[Spoken], call: Call
) -> HostAgent:
    """An arm's simulator behind an endpoint.

    Args:
        model: whose tokenizer and template render raw completions.
        people: whose messages a few-shot prompt shows.
        call: sends requests to the endpoint.

    Raises:
        ConfigError: the arm cannot be this simulator.
    """
    own, limits = settings.arms[arm], settings.conversation.limits
    remote = own.remote
    assert remote is not None
    if remote.form == 'raw':
        agent, sampling = simulator_agent(settings, arm, model, {}, people), settings.conversation.fine_tuned.sampling
        return raw_simulator(call, agent, model.chat, sampling, prompt=remote.prompt, tries=remote.tries)
    try:
        person = person_of(own, model.chat, people)
    except ValueError as error:
        raise ConfigError(f'config.arms.{arm}: {error}') from error
    make = chat_simulator if remote.form == 'chat' else json_simulator
    return make(
        call,
        settings.role_play(arm),
        person=person,
        opening=own.opening,
        max_tokens=remote.max_tokens,
        max_new_tokens=limits.user_tokens,
        tries=remote.tries,
        resampling=own.repeats,
    )


def person_of(own: PretrainedSimulator, chat: Chat, people: Sequence[Spoken]) -> Part | None:
    """The text about the person that an arm's role-playing simulator is told beside the opening; None: nothing.

    Raises:
        ValueError: the file of personas cannot be used, or there are no people for few-shot.
    """
    if not own.tells_person:
        return None
    parts = [intent_part(own.intent)]
    if own.personas is not None:
        try:
            parts.append(persona_part(read_personas(own.personas)))
        except (OSError, ValueError) as error:
            raise ValueError(f'personas: {error}') from error
    if own.guidelines:
        parts.append(guideline_part(own.guidelines))
    if own.few_shot is not None:
        if not people:
            raise ValueError('few_shot: expected messages of people in the training split, found none')
        parts.append(few_shot_part(own.few_shot, people, chat))
    return about(parts)


def _role_play(
    settings: PretrainedSettings,
    model: Model,
    params: Params,
    own: PretrainedSimulator,
    asked: RolePlaySettings,
    people: Sequence[Spoken],
) -> ModelAgent:
    if model.chat.system_header is None:
        raise ValueError(
            'role_play: expected a chat template that takes a system text, found one that does not '
            f'({model.chat.no_system_reason})'
        )
    return role_play(
        model.chat,
        model.config,
        params,
        _sampling(settings, own.dtype),
        max_new_tokens=settings.conversation.limits.user_tokens,
        settings=asked,
        person=person_of(own, model.chat, people),
        opening=own.opening,
        resampling=own.repeats,
    )


def tuned_text(own: PretrainedSimulator) -> Callable[[Example | Conversation], str] | None:
    """The system text of an arm's fine-tuned simulator, in training and when it is sampled."""
    return tuned_system(own.intent == 'required', own.source_tag)


def _fine_tuned(settings: PretrainedSettings, model: Model, params: Params, own: PretrainedSimulator) -> ModelAgent:
    system = tuned_text(own)
    if system is not None and model.chat.system_header is None:
        raise ValueError(
            'fine_tuned: expected a chat template that takes a system text, found one that does not '
            f'({model.chat.no_system_reason})'
        )
    return fine_tuned(
        model.chat,
        model.config,
        params,
        _sampling(settings, own.dtype),
        max_new_tokens=settings.conversation.limits.user_tokens,
        settings=settings.conversation.fine_tuned,
        system=system,
        resampling=own.repeats,
    )


def _sampling(settings: PretrainedSettings, dtype: Dtype | None) -> Execution:
    sampling = settings.compute.sampling
    return sampling if dtype is None else dataclasses.replace(sampling, dtype=dtype)
