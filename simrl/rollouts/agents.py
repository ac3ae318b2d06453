"""The agents of a conversation: `Agent = ModelAgent | HostAgent | MixedAgent`.

A `ModelAgent` is a model on the device: a `Policy`, and its prompt for an example. A `HostAgent` is
anything else that replies: a scripted person, or a model behind an interface. A user simulator and an assistant differ
in their role alone. A `MixedAgent` is several users, one of which each example meets.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, TERMINAL_TEXT, USER, Chat, Header
from simrl.conversations.records import Example
from simrl.conversations.views import Rendered, View, natural_prompt, swapped_prompt
from simrl.models.transformer import Execution, Params, TransformerConfig
from simrl.rollouts.token_sampling import Sampling

System = Callable[[Example], str]  # an example -> the system text of its conversations
# The user's opening: 'given' by the example, or written for each conversation where it has none; or 'written' by the
# user once for each example, whatever the example has.
Opening = Literal['given', 'written']


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """The static facts about a policy, which its compiled programs depend on.

    Attributes:
        config, execution: of the model.
        role: USER or ASSISTANT.
        own_header: tokens between the end of the partner's message and the next own content, footer included.
        partner_header: the same before the partner's messages, in this agent's view.
        own_first_header, partner_first_header: the same in a context without messages.
        end_of_turn: the token that ends own messages.
        partner_end_of_turn: the token that ends the partner's messages, in this agent's view.
        max_new_tokens: max tokens sampled for a message, end-of-turn included.
        stop_sequences: token runs, each of which ends the conversation once sampled. An assistant has none.
        top_k, top_p, min_p: as in `Sampling`.
        feed_chunk: max given tokens fed at once, which bounds their activations and attention scores.
    """

    config: TransformerConfig
    execution: Execution
    role: int
    own_header: tuple[int, ...]
    partner_header: tuple[int, ...]
    own_first_header: tuple[int, ...]
    partner_first_header: tuple[int, ...]
    end_of_turn: int
    partner_end_of_turn: int
    max_new_tokens: int
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    feed_chunk: int = 128

    def __post_init__(self) -> None:
        if self.role not in (USER, ASSISTANT):
            raise ValueError(f'GenerationSpec.role: expected USER={USER} or ASSISTANT={ASSISTANT}, found {self.role}')
        for field in ('max_new_tokens', 'feed_chunk'):
            if getattr(self, field) < 1:
                raise ValueError(f'GenerationSpec.{field}: expected at least 1, found {getattr(self, field)}')
        for run in self.stop_sequences:
            if not 0 < len(run) <= self.max_new_tokens:
                raise ValueError(
                    f'GenerationSpec.stop_sequences: expected runs of 1 to max_new_tokens={self.max_new_tokens} '
                    f'tokens, found {len(run)}: {run}'
                )


@flax.struct.dataclass
class Policy:
    """A model and how it is sampled: all that a compiled program reads of an agent.

    Attributes:
        params: `{'decoder'}`.
        token_mask: bool `[V]`, the ids that it may sample.
        temperature: a scalar; 0 is greedy.
        spec: static.
    """

    params: Params
    token_mask: np.ndarray | jax.Array
    temperature: jax.Array | float
    spec: GenerationSpec = flax.struct.field(pytree_node=False)

    @property
    def max_new_tokens(self) -> int:
        return self.spec.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Resampling:
    """The rule for a user's message that repeats its last one word for word: it is discarded and sampled again."""

    tries: int = 5  # discarded messages at most, after which a repeat stays
    temperature_step: float = 0.05  # added to the temperature with each try
    max_temperature: float = 1.0  # where the temperature stops rising; a higher one stays as it is

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f'Resampling.tries: expected at least 1, found {self.tries}')
        for field in ('temperature_step', 'max_temperature'):
            if getattr(self, field) < 0:
                raise ValueError(f'Resampling.{field}: expected at least 0, found {getattr(self, field)}')

    def temperature(self, usual: float, attempt: int) -> float:
        """The temperature of an attempt, counted from 1."""
        return max(usual, min(usual + self.temperature_step * attempt, self.max_temperature))


@dataclasses.dataclass(frozen=True, eq=False)
class ModelAgent:
    """An agent on the device.

    Attributes:
        policy: its model.
        prompt: an example -> its view before the first sampled message.
        system: an example -> the system text in that prompt, persona included. None: the template's default.
        stop_text: the text by which it ends a conversation; empty where it cannot.
        opening: of a user, see `Opening`.
        resampling: of a user's repeats; None: they stay.
        mesh: of its parameters, where it is not that of the conversations. None: it is.
    """

    policy: Policy
    prompt: Callable[[Example], Rendered]
    system: System | None = None
    stop_text: str = ''
    opening: Opening = 'given'
    resampling: Resampling | None = None
    mesh: Mesh | None = None

    @property
    def role(self) -> int:
        return self.policy.spec.role

    @property
    def max_new_tokens(self) -> int:
        return self.policy.spec.max_new_tokens

    def with_params(self, params: Params) -> 'ModelAgent':
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, params=params))


@dataclasses.dataclass(frozen=True)
class HostConversation:
    """A conversation as an agent off the device reads it.

    Attributes:
        example: what it started from.
        sample: which of the example's conversations it is.
        messages: all messages so far, as (role, text), role 'user' or 'assistant', from the user's opening.
    """

    example: Example
    sample: int
    messages: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A message of an agent off the device: with `ends` the conversation's last, with a `failure` (a reason) none.

    `resamples`: how many messages the agent discarded before this one. `truncated`: whether the agent's own limit cut
    it.
    """

    text: str
    ends: bool = False
    failure: str | None = None
    resamples: int = 0
    truncated: bool = False


Asked = Literal['share', 'all']  # the conversations that an agent off the device is asked about in each process
PIECES_AT_ONCE = 2  # of a step, in progress, with an agent off the device: one is sampled while the other waits


@dataclasses.dataclass(frozen=True)
class HostAgent:
    """An agent that is not on the device.

    Attributes:
        reply: (conversations, seeds) -> a reply to each. The conversations are those that wait for this agent, in the
            order of their rows. `seeds`, uint32, has one number for each conversation, which stays the same from its
            first message to its last: all that is random about the agent may be drawn from it and from the messages.
        max_new_tokens: max tokens of a message, end-of-turn included; a longer one is cut and counted.
        stop_text: the end of a message that ends a conversation, once decoded.
        system: an example -> the instructions of the agent, for the logs. None: it has none.
        opening: of a user, see `Opening`; it is asked for an opening in a conversation without messages.
        calls_at_once: calls of `reply` in progress at once, up to `PIECES_AT_ONCE`. Where the conversations of a step
            are sampled in pieces (`rows_in_flight`), `reply` is called in a thread, so that the device samples one
            piece while another waits; more than 1 only if several threads may call it at once. 0 calls it in the
            caller's thread, while nothing else is done: right for what is quick, or computes on the device itself.
        replayable: its replies are functions of the messages and of this call's seed alone, so that a recorded
            conversation may go on with another seed (rewards by futures).
        asked: of several processes, 'share' asks each about its own share of the conversations, and all get all
            replies. 'all' asks each about all of them, with equal arguments in the same order: for an agent that
            computes on the devices of all processes, and whose replies are therefore equal in all of them.
    """

    reply: Callable[[Sequence[HostConversation], np.ndarray], Sequence[Reply]]
    max_new_tokens: int
    stop_text: str = TERMINAL_TEXT
    system: System | None = None
    opening: Opening = 'given'
    calls_at_once: int = 0
    replayable: bool = False
    asked: Asked = 'share'

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f'HostAgent.max_new_tokens: expected at least 1, found {self.max_new_tokens}')
        if self.calls_at_once < 0:
            raise ValueError(f'HostAgent.calls_at_once: expected at least 0, found {self.calls_at_once}')
        if self.asked not in get_args(Asked):
            raise ValueError(f"HostAgent.asked: expected 'share' or 'all', found {self.asked!r}")
        if self.asked == 'all' and self.calls_at_once:
            raise ValueError(
                "HostAgent.calls_at_once: expected 0 with asked='all', as threads of several processes call in no "
                f'common order, found {self.calls_at_once}'
            )


OneAgent = ModelAgent | HostAgent


@dataclasses.dataclass(frozen=True, eq=False)
class MixedAgent:
    """Several users. All conversations of an example meet one of them.

    Attributes:
        members: the users, with the same max tokens per message.
        choose: an example -> the number of its member.
    """

    members: tuple[OneAgent, ...]
    choose: Callable[[Example], int]

    def __post_init__(self) -> None:
        found = {member.max_new_tokens for member in self.members}
        if len(found) != 1:
            raise ValueError(f'MixedAgent.members: expected one max_new_tokens, found {sorted(found) or "no members"}')

    @property
    def max_new_tokens(self) -> int:
        return self.members[0].max_new_tokens


Agent = OneAgent | MixedAgent


def mesh_of(agent: OneAgent, mesh: Mesh) -> Mesh:
    """The mesh of an agent in conversations on `mesh`: that or its own."""
    own = agent.mesh if isinstance(agent, ModelAgent) else None
    return mesh if own is None else own


def agent_for(agent: Agent, example: Example) -> OneAgent:
    """The agent of an example's conversations."""
    return agent.members[agent.choose(example)] if isinstance(agent, MixedAgent) else agent


def told(agent: Agent, example: Example) -> str | None:
    """The system text of an agent for an example, persona included; None: the template's default, or none."""
    system = agent_for(agent, example).system
    return None if system is None else system(example)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The sizes of a run's conversations."""

    turns: int  # max user messages with a reply, a given opening included
    prompt_tokens: int  # max tokens of a prompt in either view
    assistant_tokens: int  # max tokens per assistant message, end-of-turn included
    user_tokens: int  # max tokens per simulated user's message, end-of-turn included

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f'Limits.{field.name}: expected at least 1, found {getattr(self, field.name)}')


def model_agent(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    role: int,
    max_new_tokens: int,
    sampling: Sampling,
    view: View = 'natural',
    system: System | None = None,
    stop_text: str = '',
    opening: Opening = 'given',
    resampling: Resampling | None = None,
) -> ModelAgent:
    """A model as the user or the assistant.

    Args:
        role: USER or ASSISTANT.
        max_new_tokens: max tokens per message, end-of-turn included.
        view: 'natural', under its own header; or 'swapped', under the other's, which needs a system text.
        system: an example -> the system text. None: the template's default.
        stop_text: the text by which it ends a conversation: the terminal token's, or one that a prompt asks for.
        opening: of a user, see `Opening`.
        resampling: of a user's repeats; None: they stay.

    Raises:
        ValueError: a stop text that no message has room for, a swapped view without a system text, or a header under
            which no model can speak.
    """
    if view == 'swapped' and system is None:
        raise ValueError('swapped view: expected a system text that asks for the other role, found none')
    swapped = view == 'swapped'
    own: Header = 'user' if (role == USER) != swapped else 'assistant'
    partner: Header = 'assistant' if own == 'user' else 'user'
    terminal = stop_text == TERMINAL_TEXT
    chat.check_ends(own)

    def prompt(example: Example) -> Rendered:
        given = example.opening if opening == 'given' else None
        if system is None:
            return natural_prompt(chat, given)
        text = system(example)
        return swapped_prompt(chat, text) if swapped else natural_prompt(chat, given, text)

    stop_sequences: tuple[tuple[int, ...], ...] = ((chat.terminal,),) if terminal else ()
    if stop_text and not terminal:
        runs = chat.terminal_runs(stop_text)
        stop_sequences = tuple(run for run in runs if len(run) <= max_new_tokens)
        if not stop_sequences:
            raise ValueError(
                f'stop text {stop_text!r}: expected at most the {max_new_tokens} tokens of a message, found at least '
                f'{min(map(len, runs))}'
            )
    given = None if system is None else ''  # the first header depends on whether there is a system text, not on which
    spec = GenerationSpec(
        config=config,
        execution=execution,
        role=role,
        own_header=chat.header(own),
        partner_header=chat.header(partner),
        own_first_header=chat.first_header(own, given),
        partner_first_header=chat.first_header(partner, given),
        end_of_turn=chat.end_of_turn[own],
        partner_end_of_turn=chat.end_of_turn[partner],
        max_new_tokens=max_new_tokens,
        stop_sequences=stop_sequences,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    token_mask = chat.token_mask(config.padded_vocab_size, terminal=terminal, header=own)
    policy = Policy(params=params, token_mask=token_mask, temperature=sampling.temperature, spec=spec)
    return ModelAgent(policy, prompt, system, stop_text, opening, resampling)


def assistant(
    chat: Chat,
    config: TransformerConfig,
    params: Params,
    execution: Execution,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    system: System | None = None,
) -> ModelAgent:
    """A model as the assistant: it reads the conversation, and nothing of an intent."""
    return model_agent(
        chat,
        config,
        params,
        execution,
        role=ASSISTANT,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        system=system,
    )


def opening_only() -> HostAgent:
    """A user who never writes, for one reply to a given opening: one turn ends before the user is asked."""

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> Sequence[Reply]:
        raise ValueError(f'expected one turn from given openings, found {len(conversations)} that wait for the user')

    return HostAgent(reply, max_new_tokens=1, stop_text='')


def fitting(
    examples: Sequence[Example], agents: Sequence[Agent], chat: Chat, prompt_tokens: int
) -> tuple[list[Example], int]:
    """The examples whose prompts fit into `prompt_tokens` for every agent, and the number of those that do not."""

    def fits(example: Example) -> bool:
        if example.opening is not None and len(chat.encode(example.opening)) > prompt_tokens:
            return False
        own = [agent_for(agent, example) for agent in agents]
        return all(len(agent.prompt(example)) <= prompt_tokens for agent in own if isinstance(agent, ModelAgent))

    kept = [example for example in examples if fits(example)]
    return kept, len(examples) - len(kept)
