"""Judges of the command line: endpoints by their models' names, whose answers are kept beside a tool's output."""

import argparse
import collections
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from simrl.evaluation.results.judges import PANEL
from simrl.main import USER_ERRORS
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.run.config import from_config_dict

# Of a command: the number of answers that it could not have, and what helps, in words.
Missing = tuple[int, str]
ON_DEVICE = 'the same command finds the same: shorten, mend or leave out these prompts, or raise --prompt_tokens'
DETAIL_LENGTH = 240  # characters of a failure's detail on the console
IDS_SHOWN = 5  # of rows without a reply


def run_command(options: argparse.Namespace, wanted: str) -> None:
    """Runs `options.run`, which returns what is `Missing`; exits with a line if anything is.

    Args:
        wanted: all of the answers, in words.
    """
    with one_line_errors():
        lost, helps = options.run(options)
    if lost:
        sys.exit(f'error: expected {wanted}, found {lost} missing; {helps}')


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a command that continues where it was: an error of its user is one line, and so is Ctrl-C."""
    try:
        yield
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('stopped; the same command continues', file=sys.stderr)
        sys.exit(130)


def asked_again(output: pathlib.Path, *, has_tries: bool) -> str:
    """Says which answers of endpoints the same command asks for again, and where the others are kept."""
    more = 'more --tries ask for others, and ' if has_tries else ''
    return (
        f'the same command asks again for those that a server failed; answers that cannot be read are kept in '
        f'{cache_path(output)}: {more}without the file all are asked for anew. It keeps answers by model name and '
        'request, not by address: another server under the same name is not asked for them again'
    )


def print_missing(what: str, failed: Mapping[str, int], ids: Sequence[str]) -> None:
    """Prints the number of rows without a reply by cause, the most frequent first, and the ids of some of them."""
    for cause, count in collections.Counter(failed).most_common():
        print(f'{what}: {count} ({cause})')
    if ids:
        more = f' and {len(ids) - IDS_SHOWN} more' if len(ids) > IDS_SHOWN else ''
        print(f'{what} to: {", ".join(map(repr, ids[:IDS_SHOWN]))}{more}')


def check_output(path: pathlib.Path, *suffixes: str) -> None:
    """Refuses a file's name that cannot be written, before anything is asked.

    Raises:
        ValueError: the name ends in none of the suffixes, or is a folder's.
    """
    if not path.name.endswith(suffixes):
        raise ValueError(f'--output: expected a name that ends in {" or ".join(suffixes)}, found {path.name}')
    if path.is_dir():
        raise ValueError(f'--output: expected a file, found the folder {path}')


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
        if settings.model == PANEL:
            raise ValueError(
                f'--judge: expected a model of another name than {PANEL!r}, which all judges together have'
            )
        found[settings.model] = settings
    return found


@contextlib.contextmanager
def opened(endpoints: Mapping[str, EndpointSettings], output: pathlib.Path) -> Iterator[dict[str, Endpoint]]:
    """Clients with one cache beside the output; prints their usage at the end, and why calls failed."""
    with Cache(cache_path(output)) as cache, contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(Endpoint(settings, cache=cache)) for name, settings in endpoints.items()}
        try:
            yield clients
        finally:
            for name, client in clients.items():
                print_usage(name, client)


def print_usage(name: str, client: Endpoint) -> None:
    """Prints the usage of an endpoint, and why the first call of each cause of failure failed."""
    print(f'endpoint {name}: {client.usage()}', flush=True)
    for cause, detail in client.first_details().items():
        print(f'  first failure ({cause}): {one_line(detail)}', flush=True)


def one_line(detail: str) -> str:
    """A failure's detail as a line of at most `DETAIL_LENGTH` characters and an ellipsis."""
    line = ' '.join(detail.split())
    return line if len(line) <= DETAIL_LENGTH else f'{line[:DETAIL_LENGTH]}...'


def cache_path(output: pathlib.Path) -> pathlib.Path:
    """The file beside the output in which answers are kept."""
    return output.with_name(output.name + '.answers.sqlite')
