"""A streamed chat: server-sent events in, pieces of text out, and at the end the reply that they make up.

The events are those of the OpenAI API: chunks of one choice, perhaps one with the usage and no choice, then `[DONE]`.
The whole reply is read as one that was not streamed: both have the same answers and causes of failure.
"""

from typing import Any

from simrl.remote.answers import Failure, Outcome, read_value, shown
from simrl.remote.requests import ChatRequest
from simrl.remote.schema import parse_json

DONE = '[DONE]'
JOINED = ('content', 'reasoning_content', 'reasoning', 'refusal')  # texts of a message that come in pieces


class ServerSentEvents:
    """Bytes in, in parts of any size; the data of whole events out. Other fields and comments are left out.

    https://html.spec.whatwg.org/multipage/server-sent-events.html, except that a lone carriage return ends no line.
    """

    def __init__(self) -> None:
        self._rest = b''
        self._data: list[bytes] = []

    def read(self, part: bytes) -> list[bytes]:
        # Split as bytes: what else ends a line of text may be in a JSON string.
        *lines, self._rest = (self._rest + part).split(b'\n')
        found = []
        for line in lines:
            line = line.removesuffix(b'\r')
            if line.startswith(b'data:'):
                self._data.append(line[5:].removeprefix(b' '))
            elif not line and self._data:
                found.append(b'\n'.join(self._data))
                self._data = []
        return found


class StreamedReply:
    """The reply to a request while its events come."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._events = ServerSentEvents()
        self._message: dict[str, Any] = {'role': 'assistant'}
        self._choice: dict[str, Any] = {'message': self._message}  # the last value of each of its fields
        self._usage: Any = None
        self._failure: Failure | None = None
        self._has_begun = self._is_done = False

    def read(self, part: bytes) -> list[str]:
        """The new texts of the message in a part of the body, one for each event that has some."""
        found = []
        for data in self._events.read(part):
            self._has_begun = True
            if self._failure is None and not self._is_done:
                found.append(self._take(data.decode(errors='surrogateescape')))
        return [text for text in found if text]

    def outcome(self) -> Outcome:
        """The answer, or why there is none, once the body has ended."""
        if self._failure is not None:
            return self._failure
        if 'finish_reason' not in self._choice:
            if not self._has_begun:
                return Failure('protocol', 'expected server-sent events, found a reply of status 200 without one')
            return Failure('cut', 'the stream ended before the answer did')
        return read_value({'choices': [self._choice], 'usage': self._usage}, self._request)

    def _take(self, data: str) -> str:
        """The text of an event."""
        if data == DONE:
            self._is_done = True
            return ''
        try:
            event = parse_json(data)
        except ValueError as error:
            self._failure = Failure('protocol', f'expected events of JSON, found {shown(data)} ({error})')
            return ''
        match event:
            case {'error': error} if error:
                self._failure = Failure('server', f'an error in the stream: {shown(str(error))}')
            case {'choices': [{'delta': dict(delta)} as choice]}:
                new = {name: text for name in JOINED if isinstance(text := delta.get(name), str)}
                self._message |= {name: self._message.get(name, '') + text for name, text in new.items()}
                others = ('finish_reason', 'stop_reason', 'matched_stop')
                self._choice |= {name: choice[name] for name in others if choice.get(name) is not None}
                self._usage = event.get('usage') or self._usage
                return new.get('content', '')
            case {'choices': []}:
                self._usage = event.get('usage') or self._usage
            case _:
                self._failure = Failure('protocol', f'expected chunks of a chat, found {shown(data)}')
        return ''
