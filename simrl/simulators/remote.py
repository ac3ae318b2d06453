"""Simulators behind an endpoint: chat messages, JSON role-play, and raw completions with our own rendering.

`chat_simulator` sends roles exchanged, so that the model replies as the user. `json_simulator` sends the conversation
in one message and reads an object; its fields before the response are where the model thinks. `raw_simulator` sends the
tokens of a fine-tuned simulator's view, or their text, for one that is served elsewhere.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Literal

from simrl.conversations.chat import Chat
from simrl.conversations.records import Example, Message
from simrl.remote.answers import Answer
from simrl.remote.requests import ChatRequest, CompletionRequest
from simrl.remote.schema import object_of
from simrl.rollouts.agents import (
    PIECES_AT_ONCE,
    HostAgent,
    HostConversation,
    ModelAgent,
    Opening,
    Resampling,
    System,
)
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators import prompts
from simrl.simulators.person import Part
from simrl.simulators.replies import Call, Read, ask, read_message, sample_of, server_seed
from simrl.simulators.role_play import RolePlaySettings, role_play_text
from simrl.simulators.text_view import text_view

PromptAs = Literal['ids', 'text']  # how a raw completion's prompt is sent
TEXT = {'type': 'string', 'minLength': 1}
SCHEMA = object_of(current_answer=TEXT, thought=TEXT, response=TEXT)
# It waits for others, and reads nothing but messages and the seed of the call.
_remote_agent = functools.partial(HostAgent, calls_at_once=PIECES_AT_ONCE, replayable=True)


def chat_simulator(
    call: Call,
    settings: RolePlaySettings,
    *,
    person: Part | None,
    opening: Opening,
    max_tokens: int,
    max_new_tokens: int,
    tries: int,
    resampling: Resampling | None,
) -> HostAgent:
    """A prompted model behind an endpoint, in plain messages.

    Args:
        call: sends requests; several threads may call it at once.
        person, opening: see `role_play_text`.
        max_tokens: max tokens of an answer, as the server counts them.
        max_new_tokens: max tokens of a message in the assistant's view.
        tries: replies asked for in a row, at most.
        resampling: of repeats, within the tries; None: they stay.
    """
    system = role_play_text(settings, person, opening)

    def request(conversation: HostConversation, seed: int, attempt: int) -> ChatRequest:
        said = conversation.messages[1 if opening == 'given' else 0 :]
        messages = [Message('system', system(conversation.example))]
        messages += [Message('assistant' if role == 'user' else 'user', text) for role, text in said]
        if not said:
            messages.append(Message('user', prompts.OPENING_REQUEST))
        return ChatRequest(
            messages=tuple(messages),
            max_tokens=max_tokens,
            sampling=_warmer(settings.sampling, resampling, attempt),
            seed=server_seed(seed, attempt),
            sample=sample_of(seed, attempt),
            version=prompts.VERSION,
        )

    def read(answer: Answer, conversation: HostConversation) -> Read:
        return read_message(answer.text, settings.signal, conversation, repeats=resampling is not None)

    return _remote_agent(ask(call, request, read, tries), max_new_tokens, settings.signal, system, opening)


def _warmer(sampling: Sampling, rule: Resampling | None, attempt: int) -> Sampling:
    """The sampling of an attempt, counted from 0."""
    if rule is None or not attempt:
        return sampling
    return dataclasses.replace(sampling, temperature=rule.temperature(sampling.temperature, attempt))


def json_text(settings: RolePlaySettings, person: Part | None) -> Callable[[Example], str]:
    """An example -> the instructions of JSON role-play, before the conversation is filled in."""

    def system(example: Example) -> str:
        about = prompts.NOTHING_KNOWN if person is None else person(example)
        return prompts.fill(prompts.JSON_INSTRUCTIONS, signal=settings.signal, person=about)

    return system


def json_simulator(
    call: Call,
    settings: RolePlaySettings,
    *,
    person: Part | None,
    opening: Opening,
    max_tokens: int,
    max_new_tokens: int,
    tries: int,
    resampling: Resampling | None,
) -> HostAgent:
    """A prompted model behind an endpoint that answers with `{current_answer, thought, response}`.

    Args:
        settings: its instructions are not used: those of this form are `prompts.JSON_INSTRUCTIONS`.
        max_tokens: max tokens of the whole object.
        call, person, opening, max_new_tokens, tries, resampling: as of `chat_simulator`.
    """
    system: System = json_text(settings, person)

    def request(conversation: HostConversation, seed: int, attempt: int) -> ChatRequest:
        said = [{'from': 'person' if role == 'user' else 'assistant', 'text': x} for role, x in conversation.messages]
        # Filled in last and once: braces of a conversation are text, and JSON keeps it apart from the instructions.
        template = system(conversation.example)
        history = json.dumps(said, ensure_ascii=False, indent=1) if said else prompts.NOT_BEGUN
        return ChatRequest(
            messages=(Message('user', f'{template}\n{history}'),),
            max_tokens=max_tokens,
            sampling=_warmer(settings.sampling, resampling, attempt),
            schema=SCHEMA,
            seed=server_seed(seed, attempt),
            sample=sample_of(seed, attempt),
            version=prompts.VERSION,
        )

    def read(answer: Answer, conversation: HostConversation) -> Read:
        return read_message(answer.value['response'], settings.signal, conversation, repeats=resampling is not None)

    return _remote_agent(ask(call, request, read, tries), max_new_tokens, settings.signal, system, opening)


def raw_simulator(
    call: Call, agent: ModelAgent, chat: Chat, sampling: Sampling, *, prompt: PromptAs, tries: int
) -> HostAgent:
    """A model behind an endpoint of raw completions, which reads the view that it would have on the device.

    Args:
        call: sends requests; several threads may call it at once.
        agent: the simulator as on the device; its parameters are not read.
        chat: of the served model's tokenizer.
        prompt: 'ids', or 'text' for servers that take none.
        tries: replies asked for in a row, at most.
    """
    spec = agent.policy.spec
    stops = {token: chat.decode([token]) for token in (spec.end_of_turn, chat.terminal)}

    def request(conversation: HostConversation, seed: int, attempt: int) -> CompletionRequest:
        tokens = text_view(agent, chat, conversation).tokens
        return CompletionRequest(
            prompt=tuple(tokens) if prompt == 'ids' else chat.decode(tokens),
            max_tokens=spec.max_new_tokens,
            sampling=_warmer(sampling, agent.resampling, attempt),
            stop=(agent.stop_text,) if prompt == 'text' else (),
            stop_ids=tuple(stops),
            seed=server_seed(seed, attempt),
            sample=sample_of(seed, attempt),
            version=prompts.VERSION,
        )

    def read(answer: Answer, conversation: HostConversation) -> Read:
        text = answer.text.removesuffix(stops[spec.end_of_turn])
        if stops[spec.end_of_turn] in text:
            return Read(None, 'goes on after its end')
        return read_message(text, agent.stop_text, conversation, repeats=agent.resampling is not None)

    return _remote_agent(
        ask(call, request, read, tries), agent.max_new_tokens, agent.stop_text, agent.system, agent.opening
    )
