"""The device, and replies of a model on it, --model, as flags of several tools ask for them."""

import argparse
import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax

from simrl.conversations.chat import Chat
from simrl.evaluation.wildbench.generations import Generation, GenerationSettings, Replies, sample
from simrl.evaluation.wildbench.tasks import Task
from simrl.experiments.settings import MeshSettings
from simrl.remote.cache import Cache
from simrl.rollouts.agents import ModelAgent
from simrl.rollouts.completion import replies
from simrl.rollouts.messages import room_to_receive, room_to_send
from simrl.rollouts.token_sampling import Sampling
from simrl.run.progress import Progress
from simrl.run.runtime import enable_compilation_cache, numeric_defaults, start_backend
from simrl.serving.identity import identity_of
from simrl.serving.load import load_assistant, resampled
from tools.judges import cache_path

T = TypeVar('T')


def add_device_flags(parser: argparse.ArgumentParser, beside: str = 'beside --model only') -> None:
    """Adds flags for the length of prompts, and for sampling.

    Args:
        beside: when the flags count.
    """
    told = f'max tokens of a prompt; default: 4096; {beside}'
    parser.add_argument('--prompt_tokens', '--prompt-tokens', type=int, default=4096, help=told)
    parser.add_argument('--rows', type=int, default=16, help=f'replies sampled at once; {beside}')
    parser.add_argument('--seed', type=int, default=0, help=f'of sampling; {beside}')


@contextlib.contextmanager
def device() -> Iterator[None]:
    """JAX on the device, with the settings of all programs."""
    start_backend()
    enable_compilation_cache()
    with numeric_defaults():
        yield


@contextlib.contextmanager
def on_device(name: str, sampling: Sampling, max_tokens: int) -> Iterator[tuple[ModelAgent, Chat]]:
    """An assistant on the device, sampled by temperature and top_p."""
    with device():
        loaded = load_assistant(name)
        agent = resampled(
            loaded.agent, temperature=sampling.temperature, top_p=sampling.top_p, max_new_tokens=max_tokens
        )
        assert isinstance(agent, ModelAgent)
        yield agent, loaded.chat


def check_room(agent: ModelAgent, prompt_tokens: int) -> None:
    """Refuses a prompt and a reply that the model has no positions for.

    Raises:
        ValueError: there are too few; it names values of both flags that fit.
    """
    spec = agent.policy.spec
    around = room_to_send(spec) - spec.max_new_tokens + room_to_receive(spec, 1)  # headers and ends, without the reply
    room = spec.config.max_row_tokens - around
    if prompt_tokens + spec.max_new_tokens > room:
        reply = max(1, min(spec.max_new_tokens, room // 2))
        raise ValueError(
            f'--prompt_tokens and --max_tokens: expected a prompt and a reply of at most {room} tokens together, which '
            f'is {spec.config.row_limit} less {around} for headers, found {prompt_tokens} + {spec.max_new_tokens}; '
            f'what fits is --prompt_tokens={room - reply} --max_tokens={reply}'
        )


@contextlib.contextmanager
def replying(make: Callable[..., T], options: argparse.Namespace, sampling: Sampling, max_tokens: int) -> Iterator[T]:
    """The function that `make`, of `rollouts.completion`, makes of --model.

    Raises:
        ValueError: the model has too few positions.
    """
    with on_device(options.model, sampling, max_tokens) as (agent, chat):
        check_room(agent, options.prompt_tokens)
        yield make(
            agent,
            chat,
            prompt_tokens=options.prompt_tokens,
            batch_size=options.rows,
            mesh=MeshSettings(data=1).make(),
            seed=options.seed,
        )


def sample_on_device(
    options: argparse.Namespace, settings: GenerationSettings, tasks: Mapping[str, Task]
) -> tuple[list[Generation], collections.Counter[str]]:
    """Replies of --model, whose weights are loaded if any reply is missing."""
    start_backend()
    identity = f'{identity_of(options.model)} seed={options.seed} {jax.default_backend()} {settings}'
    with contextlib.ExitStack() as stack:

        @functools.cache
        def sampler() -> Replies:
            sampling = Sampling(settings.temperature, top_p=settings.top_p)
            return stack.enter_context(replying(replies, options, sampling, settings.max_tokens))

        return sample(
            tasks,
            lambda chats, attempt: sampler()(chats, attempt),
            stack.enter_context(Cache(cache_path(options.output))),
            generator=options.generator or options.model,
            identity=identity,
            batch_size=options.rows,
            progress=stack.enter_context(Progress('replies', len(tasks))),
        )
