"""Judges of the command line: endpoints by their models' names, whose answers are kept beside a tool's output."""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping

from simrl.main import USER_ERRORS
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.run.config import from_config_dict

ASKED_AGAIN = (
    'the same command asks again for those that a server failed; answers that cannot be read are kept in '
    '.answers.sqlite beside the output: more --tries ask for others, and without the file all are asked for anew'
)


def run_command(options: argparse.Namespace, wanted: str) -> None:
    """Runs `options.run`, which returns the number of answers that it could not have; exits with a line without all.

    Args:
        wanted: all of the answers, in words.
    """
    try:
        lost = options.run(options)
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('stopped; the same command continues', file=sys.stderr)
        sys.exit(130)
    if lost:
        sys.exit(f'error: expected {wanted}, found {lost} missing; {ASKED_AGAIN}')


def judges_of(options: argparse.Namespace) -> dict[str, EndpointSettings]:
    """The judges of --judge, by their models' names."""
    found: dict[str, EndpointSettings] = {}
    for text in options.judge:
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f'--judge: expected a JSON object, found {text!r}: {error}') from None
        if not isinstance(fields, dict):
            raise ValueError(f'--judge: expected a JSON object, found {text!r}')
        settings = from_config_dict(EndpointSettings, fields, '--judge')
        if settings.model in found:
            raise ValueError(f'--judge: expected judges of different models, found {settings.model} twice')
        found[settings.model] = settings
    return found


@contextlib.contextmanager
def opened(endpoints: Mapping[str, EndpointSettings], output: pathlib.Path) -> Iterator[dict[str, Endpoint]]:
    """Clients with one cache beside the output; prints their usage at the end."""
    with Cache(cache_path(output)) as cache, contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(Endpoint(settings, cache=cache)) for name, settings in endpoints.items()}
        try:
            yield clients
        finally:
            for name, client in clients.items():
                print(f'endpoint {name}: {client.usage()}', flush=True)


def cache_path(output: pathlib.Path) -> pathlib.Path:
    """The file beside the output in which answers are kept."""
    return output.with_name(output.name + '.answers.sqlite')
