"""Simulators behind an endpoint: chat messages, JSON role-play, and raw completions with our own rendering.

`chat_simulator` sends roles exchanged, so that the model replies as the user. `json_simulator` sends the conversation
in one message and reads an object; its fields before the response are where the model thinks. `raw_simulator` sends the
tokens of a fine-tuned simulator's view, or their text, for one that is served elsewhere.

Text of special tokens in a conversation: JSON has it in escapes, token ids keep it as text, and a prompt as text cannot
be sent with it. The messages of a chat are sent as they are: its server decides.

A raw completion ends by end-of-turn, or by the simulator's signal, and a server that leaves special tokens out of its
text returns the same text for both. Any of these shows the end: the text, the stop text or token that the server
names (vLLM, SGLang), or the last of the token ids (vLLM). A reply that ended and shows no end is a fault.
`transformers serve` shows none: behind it, a simulator with the terminal token has no messages but those that
max_tokens cut.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from simrl.conversations.chat import TERMINAL_TEXT, Chat, EncodingError
from simrl.conversations.quoting import SpecialTexts, as_json, escape
from simrl.conversations.records import Example, Message
from simrl.remote.answers import Answer, Outcome
from simrl.remote.requests import ChatRequest, CompletionRequest, Request, body_of, key_of
from simrl.remote.schema import object_of
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.agents import (
    PIECES_AT_ONCE,
    HostAgent,
    HostConversation,
    ModelAgent,
    Opening,
    Reply,
    Resampling,
    System,
)
from simrl.rollouts.token_sampling import Sampling
from simrl.simulators import prompts
from simrl.simulators.person import Part
from simrl.simulators.replies import Call, Draw, Fault, Read, ask, read_message, read_role_play
from simrl.simulators.role_play import RolePlaySettings, role_play_text
from simrl.simulators.text_view import text_view

NOWHERE = EndpointSettings('http://nowhere', 'model')  # of requests that are not sent
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
        tries: max replies with a fault for one message.
        resampling: of repeats; None: they stay.
    """
    system = role_play_text(settings, person, opening)

    def request(conversation: HostConversation, draw: Draw) -> ChatRequest:
        said = conversation.messages[1 if opening == 'given' else 0 :]
        messages = [Message('system', system(conversation.example))]
        messages += [Message('assistant' if role == 'user' else 'user', text) for role, text in said]
        if not said:
            messages.append(Message('user', prompts.OPENING_REQUEST))
        return ChatRequest(
            messages=tuple(messages),
            max_tokens=max_tokens,
            **vars(draw),
            version=prompts.VERSION,
        )

    def read(answer: Answer) -> Read:
        return read_role_play(answer.text, settings.signal, truncated=answer.truncated)

    reply = ask(call, request, read, sampling=settings.sampling, tries=tries, resampling=resampling)
    return _remote_agent(reply, max_new_tokens, settings.signal, system, opening)


def json_text(settings: RolePlaySettings, person: Part | None) -> Callable[[Example], str]:
    """An example -> the instructions of JSON role-play, before the conversation is filled in."""

    def system(example: Example) -> str:
        about = prompts.NOTHING_KNOWN if person is None else escape(person(example))
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

    def request(conversation: HostConversation, draw: Draw) -> ChatRequest:
        said = [{'from': 'person' if role == 'user' else 'assistant', 'text': x} for role, x in conversation.messages]
        template = system(conversation.example)
        history = as_json(said, indent=1) if said else prompts.NOT_BEGUN
        return ChatRequest(
            messages=(Message('user', f'{template}\n{history}'),),
            max_tokens=max_tokens,
            **vars(draw),
            schema=SCHEMA,
            version=prompts.VERSION,
        )

    def read(answer: Answer) -> Read:
        return read_role_play(answer.value['response'], settings.signal)

    reply = ask(call, request, read, sampling=settings.sampling, tries=tries, resampling=resampling)
    return _remote_agent(reply, max_new_tokens, settings.signal, system, opening)


def raw_simulator(
    call: Call, agent: ModelAgent, chat: Chat, sampling: Sampling, *, prompt: PromptAs, tries: int
) -> HostAgent:
    """A model behind an endpoint of raw completions, which reads the view that it would have on the device.

    Args:
        call: sends requests; several threads may call it at once.
        agent: the simulator as on the device; its parameters are not read.
        chat: of the served model's tokenizer.
        prompt: 'ids', or 'text' for servers that take none.
        tries: max replies with a fault for one message.
    """
    spec = agent.policy.spec
    end_of_turn = chat.decode([spec.end_of_turn])
    specials = SpecialTexts(chat)
    ends: dict[str, int | None] = {end_of_turn: spec.end_of_turn}  # texts of the ends that are asked for, and tokens
    if agent.stop_text == TERMINAL_TEXT:
        ends[TERMINAL_TEXT] = chat.terminal
    elif prompt == 'text':
        ends[agent.stop_text] = None

    def request(conversation: HostConversation, draw: Draw) -> CompletionRequest | Reply:
        try:
            tokens = text_view(agent, chat, conversation).tokens
        except EncodingError as error:  # what the assistant said
            return Reply('', failure=error.reason)
        sent: tuple[int, ...] | str = tuple(tokens)
        if prompt == 'text':
            sent = chat.decode(tokens)
            if special := specials.in_content(tokens, sent):
                return Reply(
                    '', failure=f'the text {special!r} in the prompt would become a special token of the server'
                )
        return CompletionRequest(
            prompt=sent,
            max_tokens=spec.max_new_tokens,
            stop=(agent.stop_text,) if prompt == 'text' else (),
            stop_ids=tuple(token for token in ends.values() if token is not None),
            version=prompts.VERSION,
            **vars(draw),
        )

    def read(answer: Answer) -> Read:
        text = _with_end(answer, ends)
        if text is None:
            return Fault('does not show how it ended')
        message = text.removesuffix(end_of_turn)
        if specials.first(message.partition(agent.stop_text)[0]):
            return Fault('holds a special token')
        return read_message(message, agent.stop_text, truncated=message == text and answer.truncated)

    reply = ask(call, request, read, sampling=sampling, tries=tries, resampling=agent.resampling)
    return _remote_agent(reply, agent.max_new_tokens, agent.stop_text, agent.system, agent.opening)


def _with_end(answer: Answer, ends: Mapping[str, int | None]) -> str | None:
    """The text of a raw completion with the text of its end; None where it ended and nothing shows which end it was.

    Args:
        ends: texts of the ends that were asked for, and their tokens.
    """
    if any(end in answer.text for end in ends):
        return answer.text
    last = answer.tokens[-1] if answer.stop is None and answer.tokens else answer.stop
    for end, token in ends.items():
        if last is not None and last in (end, token):
            return answer.text + end
    is_known = answer.truncated or (len(ends) == 1 and answer.stop is None)
    return answer.text if is_known else None


class _NotSentError(Exception):
    """Ends a reply whose requests were only to be seen."""


def request_keys(make: Callable[[Call], HostAgent], example: Example) -> list[str]:
    """The keys of all that an agent sends to its endpoint: for an opening, and for its next message.

    Args:
        make: an agent of its calls, which are not sent.
    """
    keys: list[str] = []

    def call(requests: Sequence[Request]) -> list[Outcome]:
        keys.extend(key_of(request, body_of(request, NOWHERE)) for request in requests)
        raise _NotSentError

    said = (('user', example.opening or 'opening'), ('assistant', 'reply'))
    conversations = [HostConversation(example, 0, messages) for messages in ((), said)]
    with contextlib.suppress(_NotSentError):
        make(call).reply(conversations, np.zeros(2, np.uint32))
    return keys
