"""Chats and raw completions as the JSON bodies of the OpenAI API, and the keys of their cached answers.

What a body leaves out, a server fills in by its own defaults, for vLLM those of the model's generation_config.json:
temperature and top_p are therefore always sent. `Sampling` with top_k or min_p 0 sends neither, since OpenAI refuses
them; where a server's own defaults filter, `EndpointSettings.extra` turns them off ('{"top_k": -1}').
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from simrl.conversations.records import ROLES, Message
from simrl.remote.schema import Schema, check_schema
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.token_sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A request for the next message of a chat.

    Attributes:
        messages: of any order of roles.
        max_tokens: max tokens of the answer, reasoning included.
        stop: texts before which the answer ends.
        seed: of the server's sampling, where it takes one.
        schema: of a JSON answer, in the subset of `schema.py`. None: any text.
        sample: another number asks for another answer to an equal request.
        version: of the prompt.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Schema | None = None
    sample: int = 0
    version: str = ''

    path = '/chat/completions'

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError('ChatRequest.messages: expected at least one, found none')
        if wrong := [message.role for message in self.messages if message.role not in ROLES]:
            raise ValueError(f'ChatRequest.messages: expected roles of {ROLES}, found {wrong}')
        if self.schema is not None:
            check_schema(self.schema, 'ChatRequest.schema')
        _check_max_tokens(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request for the tokens after a prompt, which is sent as it is: no template, no added token.

    Special tokens stay in the answer's text, the stop text included: `<|endconversation|>` is read from it. The fields
    for that are those of vLLM and SGLang; `EndpointSettings.extra` removes those that a server refuses.

    Attributes:
        prompt: token ids; or text, for servers that take no ids, whose tokenizer reads its special tokens.
        max_tokens: max tokens of the answer.
        stop: texts after which the answer ends.
        stop_ids: tokens after which it ends.
        seed, sample, version: as of `ChatRequest`.
        log_probs: ask for the log-probability of each token.
    """

    prompt: tuple[int, ...] | str
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    log_probs: bool = False
    sample: int = 0
    version: str = ''

    path = '/completions'

    def __post_init__(self) -> None:
        if not self.prompt or (not isinstance(self.prompt, str) and min(self.prompt) < 0):
            raise ValueError(f'CompletionRequest.prompt: expected token ids or text, found {self.prompt[:8]!r}')
        _check_max_tokens(self)


Request = ChatRequest | CompletionRequest


def body_of(request: Request, settings: EndpointSettings) -> dict[str, Any]:
    """The JSON body of a request."""
    sampling = request.sampling
    body: dict[str, Any] = {
        'model': settings.model,
        settings.max_tokens_field: request.max_tokens,
        'temperature': sampling.temperature,
        'top_p': sampling.top_p,
    }
    filters = {'top_k': sampling.top_k, 'min_p': sampling.min_p}
    body |= {name: value for name, value in filters.items() if value}
    body |= {} if request.seed is None else {'seed': request.seed}
    body |= {'stop': list(request.stop)} if request.stop else {}
    if isinstance(request, ChatRequest):
        body['messages'] = [{'role': message.role, 'content': message.content} for message in request.messages]
        if request.schema is not None:
            schema = {'name': 'answer', 'strict': True, 'schema': request.schema}
            body['response_format'] = {'type': 'json_schema', 'json_schema': schema}
    else:
        body['prompt'] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        body |= {'skip_special_tokens': False, 'spaces_between_special_tokens': False}
        body |= {'include_stop_str_in_output': True, 'return_token_ids': True}
        body |= {'stop_token_ids': list(request.stop_ids)} if request.stop_ids else {}
        body |= {'logprobs': 1} if request.log_probs else {}
    body |= settings.extra_fields()
    return {name: value for name, value in body.items() if value is not None}


def streamed_body(request: ChatRequest, settings: EndpointSettings) -> dict[str, Any]:
    """The JSON body of a request whose answer comes in pieces, with its usage at the end.

    `extra` with `"stream_options": null` is for servers that refuse to tell the usage of streams.
    """
    fields = {'stream': True, 'stream_options': {'include_usage': True}}
    kept = {name: value for name, value in fields.items() if name not in settings.extra_fields()}
    return kept | body_of(request, settings)


def key_of(request: Request, body: Mapping[str, Any]) -> str:
    """The sha256 of the canonical request: its body with the model, its sample and its prompt's version.

    The URL is no part of it: a model that is served again from another port or machine finds its answers. Two models
    that are served by one name therefore need caches of their own.
    """
    whole = {'path': request.path, 'body': body, 'sample': request.sample, 'version': request.version}
    text = json.dumps(whole, sort_keys=True, separators=(',', ':'), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_max_tokens(request: Request) -> None:
    if request.max_tokens < 1:
        raise ValueError(f'{type(request).__name__}.max_tokens: expected at least 1, found {request.max_tokens}')
