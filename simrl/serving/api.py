"""Bodies of requests, by the names of the OpenAI API and, for what it has no name for, of vLLM.

A field that the server does not know is refused. Fields of the API that it cannot follow are known, and refused unless
their value asks for nothing.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Discriminator, Field, Tag

from simrl.remote.schema import parse_json
from simrl.serving.errors import ApiError, of_validation
from simrl.serving.generation import MAX_STOP_IDS, MAX_TOP

B = TypeVar('B', bound='GenerationBody')

MAX_CHOICES = 128  # answers to one prompt
MAX_PROMPTS = 2048  # of one request
MAX_STOPS = 16  # texts; the API has 4, evaluation tasks have more
LARGEST = 2**31 - 1

Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Tokens = Annotated[int, Field(ge=0, le=LARGEST)]
Id = Annotated[int, Field(ge=0, le=LARGEST)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1)]


def _form_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return 'as text'
    first = value[0] if value else ''
    return 'as lists of ids' if isinstance(first, list) else 'as texts' if isinstance(first, str) else 'as ids'


Stops = Annotated[
    Annotated[Stop, Tag('as text')]
    | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), Tag('as texts')],
    Discriminator(lambda value: 'as texts' if isinstance(value, list) else 'as text'),
]


def _only(*values: Any) -> pydantic.GetPydanticSchema:
    """Makes a field that may be left out, or have one of the values that ask for nothing."""

    def check(value: Any) -> Any:
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            raise ValueError(f'expected {" or ".join(map(json.dumps, values))}, since this server does not support it')
        return value

    checked = Annotated[Any, pydantic.AfterValidator(check), pydantic.WithJsonSchema({'enum': list(values)})]
    return pydantic.GetPydanticSchema(lambda _, handler: handler.generate_schema(checked))


Nothing = Annotated[Any, _only(None)]
NoList = Annotated[Any, _only(None, [])]
NoMap = Annotated[Any, _only(None, {})]
Zero = Annotated[Any, _only(None, 0)]
One = Annotated[Any, _only(None, 1)]
No = Annotated[Any, _only(None, False)]


class Body(pydantic.BaseModel):
    """A part of a request: no other fields, no conversions, no infinite numbers."""

    model_config = pydantic.ConfigDict(extra='forbid', strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # nothing is hidden: lengths of chunks are those of their texts
    continuous_usage_stats: No = None


class GenerationBody(Body):
    """The fields that both kinds of completions have."""

    model: str
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    # Nothing that this server does depends on these.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    spaces_between_special_tokens: bool | None = None  # no spaces are put between them

    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    repetition_penalty: One = None
    length_penalty: One = None
    logit_bias: NoMap = None
    use_beam_search: No = None
    ignore_eos: No = None
    min_tokens: Zero = None
    truncate_prompt_tokens: Nothing = None
    prompt_logprobs: Nothing = None


class TextPart(Body):
    type: Literal['text']
    text: str


class ChatMessage(Body):
    role: Literal['system', 'developer', 'user', 'assistant']
    content: Annotated[
        Annotated[str, Tag('as text')]
        | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag('as parts')],
        Discriminator(lambda value: 'as parts' if isinstance(value, list) else 'as text'),
    ]
    type: Annotated[Any, _only(None, 'text')] = None  # evaluation harnesses send it
    parsed: Any = None  # of a structured answer that is sent back, whose content is the same
    name: Nothing = None  # templates have no place for it
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: NoList = None
    annotations: NoList = None

    @property
    def text(self) -> str:
        """The content; parts are joined with line ends, as other servers do."""
        return self.content if isinstance(self.content, str) else '\n'.join(part.text for part in self.content)


class TextFormat(Body):
    type: Literal['text']


class ObjectFormat(Body):
    type: Literal['json_object']


class NamedSchema(Body):
    model_config = pydantic.ConfigDict(populate_by_name=False)

    name: str
    description: str | None = None
    strict: bool | None = None  # it is always
    schema_: Annotated[dict[str, Any], Field(alias='schema')]


class SchemaFormat(Body):
    type: Literal['json_schema']
    json_schema: NamedSchema


class ChatBody(GenerationBody):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator='type')] | None = None

    # Nothing that this server does depends on these.
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    tools: NoList = None
    tool_choice: Annotated[Any, _only(None, 'none', 'auto')] = None
    functions: NoList = None
    function_call: Annotated[Any, _only(None, 'none', 'auto')] = None
    modalities: Annotated[Any, _only(None, ['text'])] = None
    reasoning_effort: Annotated[Any, _only(None, 'none')] = None
    verbosity: Annotated[Any, _only(None, 'medium')] = None
    audio: Nothing = None
    moderation: Nothing = None
    prediction: Nothing = None
    web_search_options: Nothing = None
    chat_template: Nothing = None
    chat_template_kwargs: Annotated[Any, _only(None, {}, {'enable_thinking': False})] = None
    add_generation_prompt: Annotated[Any, _only(None, True)] = None
    add_special_tokens: No = None
    continue_final_message: No = None
    echo: No = None


Prompt = Annotated[
    Annotated[str, Tag('as text')]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag('as texts')]
    | Annotated[Ids, Tag('as ids')]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag('as lists of ids')],
    Discriminator(_form_of_prompt),
]


class CompletionBody(GenerationBody):
    """A request of /v1/completions."""

    prompt: Prompt
    max_tokens: Tokens | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None  # True by default: those that the tokenizer puts around a text
    best_of: Choices | None = None  # as many as `n`: all are returned
    suffix: Annotated[Any, _only(None, '')] = None


def read_body(kind: type[B], content: bytes) -> B:
    """A request's body.

    Raises:
        ApiError: it is no JSON, or does not fit.
    """
    try:
        value = parse_json(content.decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f'the body: expected JSON in UTF-8, found other bytes at byte {error.start}') from None
    except ValueError as error:
        raise ApiError(400, f'the body: expected JSON, found none: {error}') from None
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        raise of_validation(error) from None
