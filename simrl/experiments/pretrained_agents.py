"""The agents of pretrained models: the assistant and the simulators of `conversation`, from settings and a model.

Parameters may be `{}`: such an agent has prompts, which checks read, and cannot speak.
"""

import dataclasses

from simrl.experiments.pretrained_settings import Dtype, PretrainedSettings
from simrl.experiments.sources import Model
from simrl.models.transformer import Execution, Params
from simrl.rollouts.agents import ModelAgent, assistant
from simrl.run.config import ConfigError
from simrl.simulators.fine_tuned import fine_tuned
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


def simulator_agent(settings: PretrainedSettings, arm: str, model: Model, params: Params) -> ModelAgent:
    """An arm's simulator, which is not one of the user's own.

    Raises:
        ConfigError: the model cannot be this simulator.
    """
    own = settings.arms[arm]
    try:
        if own.simulator == 'role_play':
            return _role_play(settings, model, params, own.dtype, settings.role_play(arm))
        return _fine_tuned(settings, model, params, own.dtype)
    except ValueError as error:
        raise ConfigError(f'config.arms.{arm}: {error}') from error


def usual_agents(settings: PretrainedSettings, model: Model) -> list[ModelAgent]:
    """The assistant and the simulators of `conversation`, without weights: those whose prompts openings must fit.

    Raises:
        ConfigError: the model cannot role-play under `conversation.role_play`.
    """
    agents = [assistant_agent(settings, model, {})]
    if model.chat.ends('user'):
        agents.append(_fine_tuned(settings, model, {}, None))
    if model.chat.system_header is None:
        return agents
    try:
        return [*agents, _role_play(settings, model, {}, None, settings.conversation.role_play)]
    except ValueError as error:
        raise ConfigError(f'config.conversation.role_play: {error}') from error


def _role_play(
    settings: PretrainedSettings, model: Model, params: Params, dtype: Dtype | None, asked: RolePlaySettings
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
        _sampling(settings, dtype),
        max_new_tokens=settings.conversation.limits.user_tokens,
        settings=asked,
    )


def _fine_tuned(settings: PretrainedSettings, model: Model, params: Params, dtype: Dtype | None) -> ModelAgent:
    return fine_tuned(
        model.chat,
        model.config,
        params,
        _sampling(settings, dtype),
        max_new_tokens=settings.conversation.limits.user_tokens,
        settings=settings.conversation.fine_tuned,
    )


def _sampling(settings: PretrainedSettings, dtype: Dtype | None) -> Execution:
    sampling = settings.compute.sampling
    return sampling if dtype is None else dataclasses.replace(sampling, dtype=dtype)
