"""Errors in the API's own form: a status and `{"error": {"message", "type", "param", "code"}}`."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import pydantic

from simrl.serving.generation import Failure, QueueFullError

STATUSES: Mapping[str, int] = {  # of failures before an answer has begun, by their cause
    'cancelled': 499,  # as nginx writes it: nobody reads it
    'deadline': 504,
    'draining': 503,
    'constraint': 400,
    'internal': 500,
}
DRAINING = 'the server stops, and takes no new requests'
FAULT = 'the server had a fault, which is in its log'


class ErrorFields(pydantic.BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(pydantic.BaseModel):
    """The body of an answer with an error status, and the event of an answer that failed after it began."""

    error: ErrorFields


class ApiError(Exception):
    """An answer with an error status.

    Args:
        status: of HTTP.
        message: for people.
        param: dotted name of the field at fault.
        code: for programs.
        retry_after: seconds after which the same request may be answered.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {'error': {'message': message, 'type': _type_of(status), 'param': param, 'code': code}}
        # What is left of a refused body is not read.
        self.headers = {'Connection': 'close'}
        if retry_after:
            self.headers['Retry-After'] = str(math.ceil(retry_after))
        if status == 401:
            self.headers['WWW-Authenticate'] = 'Bearer'


def _type_of(status: int) -> str:
    named = {401: 'authentication_error', 408: 'timeout_error', 429: 'rate_limit_error', 504: 'timeout_error'}
    return named.get(status, 'server_error' if status >= 500 else 'invalid_request_error')


def of_field(param: str, problem: str, code: str | None = None) -> ApiError:
    """The error of a field: `problem` says what is expected and found."""
    return ApiError(400, f'{param}: {problem}', param=param, code=code)


def of_failure(failure: Failure) -> ApiError:
    """The error of an answer that ended without a finish."""
    texts = {'cancelled': 'the request was cancelled', 'deadline': 'no answer in time', 'draining': DRAINING}
    message = failure.detail or texts.get(failure.cause, FAULT)
    retry_after = 5.0 if failure.cause == 'draining' else 0.0
    return ApiError(STATUSES[failure.cause], message, code=failure.cause, retry_after=retry_after)


def of_full_queue(error: QueueFullError) -> ApiError:
    return ApiError(429, str(error), code='queue_full', retry_after=max(error.retry_after, 1.0))


def of_validation(error: pydantic.ValidationError) -> ApiError:
    """The error of the first field that does not fit."""
    first = error.errors(include_url=False)[0]
    param = '.'.join(str(part) for part in first['loc'] if str(part) not in TAGS)
    match first['type']:
        case 'missing':
            problem = 'expected a value, found none'
        case 'extra_forbidden':
            problem = 'expected a field of the API that this server knows, found an unknown one'
        case 'value_error':
            problem = f'{first["ctx"]["error"]}, found {shown(first["input"])}'
        case 'model_type' | 'dict_type':
            problem = f'expected an object, found {shown(first["input"])}'
        case _:
            expected = first['msg'].removeprefix('Input should be ')
            problem = f'expected {expected[:1].lower()}{expected[1:]}, found {shown(first["input"])}'
    return of_field(param, problem) if param else ApiError(400, f'the body: {problem}')


# Names of alternatives among the forms of a field, which are no part of its name.
TAGS = frozenset({'as text', 'as texts', 'as ids', 'as lists of ids', 'as parts'})


def shown(value: Any) -> str:
    """A value of the request, shortened."""
    return reprlib.repr(value)
