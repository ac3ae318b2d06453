"""A request's body -> the generations that it asks of a model."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simrl.conversations.chat import Chat, EncodingError
from simrl.conversations.records import Message, Role
from simrl.rollouts.token_sampling import Sampling
from simrl.serving.api import ChatBody, CompletionBody, GenerationBody, ObjectFormat, SchemaFormat
from simrl.serving.errors import ApiError, of_field, shown
from simrl.serving.generation import Constraint, Generation, Serving
from simrl.serving.prompts import MessagesError, chat_prompt

ROLES: Mapping[str, Role] = {'system': 'system', 'developer': 'system', 'user': 'user', 'assistant': 'assistant'}
COMPLETION_TOKENS = 16  # of a raw completion that does not say; as the API's


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Served:
    """A model that the server offers.

    Attributes:
        name: by which requests name it.
        chat: its tokenizer and template.
        serving: its engine.
        created: when its weights were loaded, in seconds since 1970.
        sampling: of requests that do not say.
        constrain: makes the constraint of one answer from a JSON schema; ValueError for one that it cannot follow.
    """

    name: str
    chat: Chat
    serving: Serving
    created: int
    constrain: Callable[[Mapping[str, Any]], Constraint]
    sampling: Sampling = Sampling()


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The generations of a request: `n` of its first prompt, then of the next.

    Attributes:
        prompt_texts: of each prompt, with `echo`.
    """

    served: Served
    generations: tuple[Generation, ...]
    n: int
    prompt_texts: tuple[str, ...] = ()


def chat_job(body: ChatBody, served: Served, deadline: float) -> Job:
    """The job of a chat.

    Args:
        deadline: `time.monotonic()` at which its answers fail.

    Raises:
        ApiError: it cannot be answered.
    """
    messages = [Message(ROLES[message.role], message.text) for message in body.messages]
    try:
        prompt = chat_prompt(served.chat, messages)
    except MessagesError as error:
        raise of_field(error.field, error.problem) from None
    field, wanted = 'max_completion_tokens', body.max_completion_tokens
    if wanted is None:
        field, wanted = 'max_tokens', body.max_tokens
    elif body.max_tokens not in (None, wanted):
        raise of_field('max_tokens', f'expected max_completion_tokens ({wanted}) alone, found {body.max_tokens}')
    if wanted == 0:
        raise of_field(field, 'expected at least 1, found 0')
    if body.top_logprobs and not body.logprobs:
        raise of_field('top_logprobs', f'expected "logprobs": true beside it, found {body.logprobs}')
    common = _common(body, served, deadline) | {
        'max_tokens': _budget(served, prompt, wanted, None, 'messages', field),
        'vocabulary': 'chat',
        'log_probs': bool(body.logprobs),
        'top': body.top_logprobs or 0,
    }
    return _job(body, served, [prompt], common, _constraints(body, served))


def completion_job(body: CompletionBody, served: Served, deadline: float) -> Job:
    """The job of raw completions; arguments and errors as of `chat_job`."""
    if body.best_of not in (None, body.n or 1):
        raise of_field('best_of', f'expected n ({body.n or 1}), since all answers are returned, found {body.best_of}')
    if body.max_tokens == 0 and not body.echo:
        raise of_field('max_tokens', 'expected at least 1 without echo, found 0')
    given: Sequence[str | list[int]]
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        given = [prompt]
    else:
        given = prompt
    add_special_tokens = body.add_special_tokens is not False
    prompts = [_raw_prompt(served.chat, one, add_special_tokens) for one in given]
    wanted, default = body.max_tokens, COMPLETION_TOKENS
    common = _common(body, served, deadline) | {
        'max_tokens': min(_budget(served, of, wanted, default, 'prompt', 'max_tokens') for of in prompts),
        'vocabulary': 'all',
        'log_probs': body.logprobs is not None,
        'top': body.logprobs or 0,
        'score_prompt': bool(body.echo) and (body.logprobs is not None or wanted == 0),
    }
    job = _job(body, served, prompts, common, [None] * (body.n or 1))
    if not body.echo:
        return job
    texts = tuple(_text_of(served.chat, one, body.skip_special_tokens is not False) for one in given)
    return dataclasses.replace(job, prompt_texts=texts)


def _common(body: GenerationBody, served: Served, deadline: float) -> dict[str, Any]:
    """Fields of a generation that both kinds of requests have."""
    if body.stream_options is not None and not body.stream:
        raise of_field('stream_options', f'expected "stream": true beside it, found {body.stream}')
    size = served.chat.size
    if wrong := [i for i in body.stop_token_ids or () if i >= size]:
        raise of_field('stop_token_ids', f'expected token ids from 0 to {size - 1}, found {wrong[0]}')
    filters = {'temperature': body.temperature, 'top_k': body.top_k, 'top_p': body.top_p, 'min_p': body.min_p}
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    if given.get('top_k') == -1:  # vLLM's way to say off
        given['top_k'] = 0
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return {
        'sampling': dataclasses.replace(served.sampling, **given),
        'stop': tuple(stop),
        'stop_ids': tuple(body.stop_token_ids or ()),
        'keep_stop': bool(body.include_stop_str_in_output),
        'keep_special': body.skip_special_tokens is False,
        'deadline': deadline,
    }


def _job(
    body: GenerationBody,
    served: Served,
    prompts: Sequence[tuple[int, ...]],
    common: Mapping[str, Any],
    constraints: Sequence[Constraint | None],
) -> Job:
    """`n` generations of each prompt. Those of equal prompts and seeds are equal, whatever else is asked for.

    Without a seed each prompt has one of its own, so that a prompt that is given twice has other answers.
    """
    most = served.serving.queue
    if (found := len(prompts) * len(constraints)) > most:
        raise of_field('n', f'expected at most {most} answers to a request, as many as may wait, found {found}')
    generations = tuple(
        Generation(prompt=prompt, seed=seed, sample=sample, constraint=constraint, **common)
        for prompt in prompts
        for seed in [secrets.randbits(64) if body.seed is None else body.seed % 2**64]
        for sample, constraint in enumerate(constraints)
    )
    return Job(served, generations, body.n or 1)


def _budget(
    served: Served, prompt: tuple[int, ...], wanted: int | None, default: int | None, field: str, wanted_field: str
) -> int:
    """Max tokens of an answer; by default what the context has left, at most `default`."""
    context, code = served.serving.context, 'context_length_exceeded'
    room, least = context - len(prompt), 1 if wanted is None else min(wanted, 1)
    if room < least:
        raise of_field(
            field,
            f"expected at most {context - least} tokens, the model's context{' less one for the answer' * least}, "
            f'found {len(prompt)}, {least - room} too many',
            code,
        )
    if wanted is not None and wanted > room:
        raise of_field(
            wanted_field,
            f"expected at most {room}, which the model's context of {context} leaves after the prompt's {len(prompt)} "
            f'tokens, found {wanted}, {wanted - room} too many',
            code,
        )
    return min(room, room if default is None else default) if wanted is None else wanted


def _constraints(body: ChatBody, served: Served) -> list[Constraint | None]:
    """A constraint of its own for each answer."""
    match body.response_format:
        case SchemaFormat(json_schema=named):
            field, schema = 'response_format.json_schema.schema', named.schema_
        case ObjectFormat():
            field, schema = 'response_format', {'type': 'object'}
        case _:
            return [None] * (body.n or 1)
    try:
        return [served.constrain(schema) for _ in range(body.n or 1)]
    except ValueError as error:
        raise of_field(field, f'expected a schema that this model can follow, found another: {error}') from None


def _raw_prompt(chat: Chat, given: str | list[int], add_special_tokens: bool) -> tuple[int, ...]:
    if not isinstance(given, str):
        if wrong := [i for i in given if i >= chat.size]:
            raise of_field('prompt', f'expected token ids from 0 to {chat.size - 1}, found {wrong[0]}')
        return tuple(given)
    try:
        prompt = tuple(chat.encode_raw(given, add_special_tokens))
    except EncodingError as error:
        raise of_field('prompt', f'expected text that the model can read, found another: {error.reason}') from None
    if not prompt:
        raise of_field('prompt', f'expected at least one token, found none in {given!r}')
    return prompt


def _text_of(chat: Chat, given: str | list[int], skip_special: bool) -> str:
    """A prompt as text."""
    if isinstance(given, str):
        return given
    hidden = {*chat.reserved, chat.terminal} if skip_special else frozenset[int]()
    return chat.decode([i for i in given if i not in hidden])


def find_served(models: Mapping[str, Served], name: str) -> Served:
    """The model of that name."""
    if name not in models:
        raise ApiError(
            404,
            f'model: expected one of {", ".join(models)}, found {shown(name)}',
            param='model',
            code='model_not_found',
        )
    return models[name]
