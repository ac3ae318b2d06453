"""An endpoint as a config states it. Its key is in an environment variable, and nowhere else."""

import dataclasses
import json
import os
import re
from typing import Any, Literal

from simrl.run.config import NO_EFFECT

URL = re.compile(r'https?://[^\s/?#@]+(/[^\s?#@]*)?')  # no user, password or query: they may be secrets
KEY = re.compile(r'[!-~]+')  # what a header can carry
RESERVED = ('model', 'messages', 'prompt', 'response_format', 'stream', 'n')  # fields that `extra` cannot change


class EndpointError(RuntimeError):
    """An endpoint that cannot be used: no key, no such model, not reachable, or its spend cap is reached."""


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """An OpenAI-compatible endpoint and the limits of its use. Costs are in the currency of the prices."""

    # Base of the API, for instance http://127.0.0.1:8000/v1. It is no part of an answer's identity: the model is, and
    # a server may be restarted elsewhere.
    url: str = dataclasses.field(metadata=NO_EFFECT)
    model: str  # name by which the endpoint serves the model
    # Environment variable with the key; None: no key is sent.
    key_variable: str | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    in_flight: int = dataclasses.field(default=16, metadata=NO_EFFECT)  # max calls at once, per process
    deadline: float = dataclasses.field(default=900.0, metadata=NO_EFFECT)  # max seconds per call, all tries together
    try_seconds: float = dataclasses.field(default=300.0, metadata=NO_EFFECT)  # max seconds per try
    tries: int = dataclasses.field(default=8, metadata=NO_EFFECT)  # max tries per call
    backoff: float = dataclasses.field(default=1.0, metadata=NO_EFFECT)  # seconds before the second try, then doubled
    max_backoff: float = dataclasses.field(default=60.0, metadata=NO_EFFECT)  # max seconds between tries
    input_price: float = dataclasses.field(default=0.0, metadata=NO_EFFECT)  # per million tokens
    output_price: float = dataclasses.field(default=0.0, metadata=NO_EFFECT)  # per million tokens
    # Cost at which calls stop; calls in flight finish, so it may be passed by `in_flight` calls of each process. With a
    # cache it covers all that was ever paid for the model through that file: of a job of several processes each has
    # its own file, and so its own cap. None: no cap.
    spend_cap: float | None = dataclasses.field(default=None, metadata=NO_EFFECT)
    max_tokens_field: Literal['max_tokens', 'max_completion_tokens'] = 'max_tokens'  # name of the field in the body
    # A JSON object merged into every body, for instance {"chat_template_kwargs": {"enable_thinking": false}}; null
    # removes a field that the server refuses.
    extra: str = ''

    def __post_init__(self) -> None:
        def check(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f'EndpointSettings.{field}: expected {expected}, found {getattr(self, field)!r}')

        if not URL.fullmatch(self.url):  # which is not shown: it may hold a key
            raise ValueError(
                'EndpointSettings.url: expected http://HOST[:PORT]/PATH or https://..., without user, password or '
                'query; found another form'
            )
        check('model', bool(self.model), 'a name')
        check('key_variable', self.key_variable is None or bool(self.key_variable), 'a name, or None')
        for field in ('in_flight', 'tries'):
            check(field, getattr(self, field) >= 1, 'at least 1')
        for field in ('deadline', 'try_seconds'):
            check(field, getattr(self, field) > 0, 'more than 0')
        for field in ('backoff', 'max_backoff', 'input_price', 'output_price'):
            check(field, getattr(self, field) >= 0, 'at least 0')
        check('spend_cap', self.spend_cap is None or self.spend_cap > 0, 'more than 0, or None')
        if self.spend_cap is not None and not (self.input_price or self.output_price):
            raise ValueError('EndpointSettings.spend_cap: expected None without a price, found a cap')
        self.extra_fields()

    def extra_fields(self) -> dict[str, Any]:
        """`extra` as fields of a body."""
        try:
            fields = json.loads(self.extra or '{}')
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f'EndpointSettings.extra: expected a JSON object, found {self.extra!r}')
        if reserved := sorted({*RESERVED, 'max_tokens', 'max_completion_tokens'} & fields.keys()):
            raise ValueError(f'EndpointSettings.extra: expected fields of the server, found our own {reserved}')
        return fields

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


def read_key(settings: EndpointSettings) -> str | None:
    """The key from the environment; None where the endpoint has none.

    Raises:
        EndpointError: the variable is missing, empty, or its value cannot be a key. The value is never shown.
    """
    if settings.key_variable is None:
        return None
    key = os.environ.get(settings.key_variable, '').strip()
    if not KEY.fullmatch(key):
        found = 'another form' if key else 'none'
        raise EndpointError(
            f'{settings.url}: expected its key in the environment variable {settings.key_variable}, printable ASCII '
            f'without spaces, found {found}'
        )
    return key
