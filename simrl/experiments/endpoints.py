"""The endpoints of a run, with one cache of their answers in its directory."""

import functools
import pathlib

from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint, check
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.run.config import ConfigError

ANSWERS_FILE = 'answers.sqlite'  # in the run directory


class Endpoints:
    """Endpoints by their settings, opened at their first use and for as long as the process lives."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._workdir = workdir
        self._open: dict[EndpointSettings, Endpoint] = {}

    def of(self, settings: EndpointSettings) -> Endpoint:
        if settings not in self._open:
            self._open[settings] = Endpoint(settings, cache=self._answers)
        return self._open[settings]

    @functools.cached_property
    def _answers(self) -> Cache:
        return Cache(self._workdir / ANSWERS_FILE)


def check_endpoint(field: str, settings: EndpointSettings) -> None:
    """Refuses an endpoint that does not answer, or does not have the model.

    Raises:
        ConfigError: naming `field`.
    """
    try:
        check(settings)
    except EndpointError as error:
        raise ConfigError(f'{field}: {error}') from error
