"""Settings of the server: its models, its address and its limits."""

import dataclasses
import os

from simrl.remote.settings import KEY
from simrl.serving.shapes import EngineSettings


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """The server's address, its key and its limits. Sizes are bytes, times seconds."""

    host: str = '127.0.0.1'  # address to listen on; 0.0.0.0 is reached from other machines
    port: int = 8000  # 0: a free one, which is printed
    # Environment variable with the key that requests must send; None: anyone who reaches the port may ask.
    key_variable: str | None = None
    connections: int = 1024  # max open connections
    body_bytes: int = 8 * 2**20  # max size of a request's body
    head_seconds: float = 10.0  # max time for a request's head to arrive
    body_seconds: float = 30.0  # max time for a request's body to arrive
    idle_seconds: float = 30.0  # a connection without a further request is closed after this time
    request_seconds: float = 600.0  # max time for an answer, its wait in the queue included
    drain_seconds: float = 60.0  # max time that answers have to end once the server stops

    def __post_init__(self) -> None:
        def check(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f'HttpSettings.{field}: expected {expected}, found {getattr(self, field)!r}')

        check('host', bool(self.host), 'an address')
        check('port', 0 <= self.port < 2**16, '0 (a free one) to 65535')
        check('key_variable', self.key_variable is None or bool(self.key_variable), 'a name, or None')
        for field in ('connections', 'body_bytes'):
            check(field, getattr(self, field) >= 1, 'at least 1')
        for field in ('head_seconds', 'body_seconds', 'idle_seconds', 'request_seconds'):
            check(field, getattr(self, field) > 0, 'more than 0')
        check('drain_seconds', self.drain_seconds >= 0, 'at least 0')

    def read_key(self) -> str | None:
        """The key from the environment; None where the server has none.

        Raises:
            ValueError: the variable is missing, empty, or its value cannot be a key. The value is never shown.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, '').strip()
        if not KEY.fullmatch(key):
            found = 'another form' if key else 'none'
            raise ValueError(
                f"HttpSettings.key_variable: expected the server's key in the environment variable "
                f'{self.key_variable}, printable ASCII without spaces, found {found}'
            )
        return key


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """A server of one or more models."""

    # NAME, or SERVED=NAME: the name by which requests name it, and the model's: RUN/ASSISTANT, RUN/SIMULATOR,
    # RUN/STAGE, a folder, OWNER/MODEL or a .gguf file.
    models: tuple[str, ...] = ()
    http: HttpSettings = HttpSettings()
    engine: EngineSettings = EngineSettings()  # of each model

    def sources(self) -> dict[str, str]:
        """The names of models by those of requests, at least one.

        Raises:
            ValueError: none, a name of nothing, or two of one name.
        """
        found: dict[str, str] = {}
        for entry in self.models:
            before, given, after = entry.partition('=')
            name, source = (before, after) if given else (entry, entry)
            if not name or not source or name in found:
                raise ValueError(f'ServeSettings.models: expected other names of requests, found {entry!r}')
            found[name] = source
        if not found:
            raise ValueError('ServeSettings.models: expected at least one name of a model, found none')
        return found
