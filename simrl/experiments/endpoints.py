"""The endpoints of a run, with a cache of their answers in its directory, and how much they are used.

Workers, and jobs of one process each, share one file. Of a job of several processes each has a file of its own, as each
asks for a share of the replies: so none waits for another to write, on whatever file system. After a kill as many
processes find their answers again; with another number of them shares are others, and what the file of a process lacks
is asked for anew. `EndpointSettings.spend_cap` covers what was paid through one file, so that n processes may pay n
times as much.

Answers that cannot be read are kept as well, so that a resumed run has the failures of an unbroken one. After a fault
of the server itself, such as a wrong template, delete the file.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint, check
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.remote.usage import Usage
from simrl.run.config import ConfigError
from simrl.run.metrics import ENDPOINT, Metrics

Used = Callable[[], Mapping[str, Usage]]  # () -> the usage since the process began, by model
Work = Callable[[pathlib.Path], None]  # of a stage, in its folder


def answers_file(process: int) -> str:
    """The name of a process's cache in the run directory."""
    return f'answers-{process}.sqlite' if process else 'answers.sqlite'


class Endpoints:
    """Endpoints by their settings, opened at their first use and for as long as the process lives."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._workdir = workdir
        self._open: dict[EndpointSettings, Endpoint] = {}

    def of(self, settings: EndpointSettings) -> Endpoint:
        if settings not in self._open:
            self._open[settings] = Endpoint(settings, cache=self._answers)
        return self._open[settings]

    def usage(self) -> dict[str, Usage]:
        """Usage by model since the process began; of endpoints that serve one model the sum."""
        total: dict[str, Usage] = {}
        for settings, endpoint in self._open.items():
            total[settings.model] = total.get(settings.model, Usage()) + endpoint.usage()
        return total

    @functools.cached_property
    def _answers(self) -> Cache:
        return Cache(self._workdir / answers_file(jax.process_index()))


def used_since(before: Mapping[str, Usage], used: Used) -> dict[str, Usage]:
    return {model: usage - before.get(model, Usage()) for model, usage in used().items()}


def showing_usage(run: Work, used: Used) -> Work:
    """The work of a stage that prints at its end, whatever the end is, how much this process used each endpoint."""

    def work(folder: pathlib.Path) -> None:
        before = used()
        try:
            run(folder)
        finally:
            for model, usage in used_since(before, used).items():
                if usage != Usage():
                    print(f'endpoint {model}: {usage}', flush=True)

    return work


def usage_metrics(used: Used) -> Callable[[], Metrics]:
    """The function whose calls return the usage since the call before as metrics: `endpoint/MODEL/tries`, ...

    They depend on what a cache answered, and so on kills. Several processes call it together: it adds up theirs.
    """
    last = used()

    def metrics() -> Metrics:
        nonlocal last
        before, last = last, dict(used())
        found = {
            f'{ENDPOINT}{model}/{name}': count
            for model, usage in used_since(before, lambda: last).items()
            for name, count in usage.counts().items()
        }
        totals = np.array(list(found.values()))
        if found and jax.process_count() > 1:
            from jax.experimental import multihost_utils

            totals = multihost_utils.process_allgather(totals).sum(axis=0)
        return {name: (float(total), 1.0) for name, total in zip(found, totals, strict=True)}

    return metrics


def check_endpoint(field: str, settings: EndpointSettings) -> None:
    """Refuses an endpoint that does not answer, or does not have the model.

    Raises:
        ConfigError: naming `field`.
    """
    try:
        check(settings)
    except EndpointError as error:
        raise ConfigError(f'{field}: {error}') from error
