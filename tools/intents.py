"""Writes conversations with a sentence each of what their user came for, by an endpoint or a model on the device.

    python -m tools.intents --data=people.jsonl --output=intents.jsonl --endpoint.url=http://127.0.0.1:8000/v1 \\
        --endpoint.model=Qwen/Qwen3-32B --endpoint.in_flight=64 --endpoint.try_seconds=1800 --endpoint.deadline=7200
    python -m tools.intents --data=people.jsonl --output=intents.jsonl --model=HuggingFaceTB/SmolLM2-135M-Instruct

Qwen3 thinks before it answers, as in arXiv:2605.09808. Its server has to return the reasoning apart from the answer:
`vllm serve Qwen/Qwen3-32B --reasoning-parser=qwen3`. It answers at once, and --max-tokens=512 is enough, with
--endpoint.extra='{"chat_template_kwargs": {"enable_thinking": false}}'.

The output is a file of conversations, for instance conversations.jsonl.gz of a new data folder. An answer that is no
sentence is asked for again, up to --tries answers in all. Conversations without a usable sentence are then left out and
counted by cause. After a kill, the same command continues: intents are kept in OUTPUT.intents.jsonl, answers of an
endpoint in OUTPUT.answers.sqlite. An answer that is no sentence is kept there too, so that the same command does not
ask for it anew; more --tries ask for more answers. The exit code is 1 if there is no sentence at all.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from simrl.conversations.completion import Complete
from simrl.conversations.intents import VERSION, IntentSettings, write_intents
from simrl.conversations.manifest import check_data
from simrl.conversations.records import read_conversations
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint
from simrl.remote.client import complete as complete_at
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.completion import complete as complete_on_device
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import from_config_dict, local_path
from simrl.run.program import run_program
from simrl.serving.identity import identity_of
from tools.device_replies import add_device_flags, replying
from tools.judges import one_line_errors, print_usage

SETTINGS = {'endpoint': EndpointSettings, 'intents': IntentSettings, 'sampling': Sampling}
CALLS = 16  # for each place in flight, between two writes: at the end of a batch some places are idle
# Of an answer, reasoning included; arXiv:2605.09808 has 16,384 and 4 tries. A model on the device has fewer positions.
MAX_TOKENS = {'endpoint': 16384, 'device': 512}
DEFAULTS = {'sampling.temperature': 0.7, 'sampling.top_p': 0.9}  # of arXiv:2605.09808, appendix C


def add_fields(parser: argparse.ArgumentParser, name: str, settings: type) -> None:
    """Adds a flag for each field of a dataclass: `--endpoint.url`."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        hint = hints[field.name]
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
        kind = str if typing.get_origin(hint) is Literal else kinds[0]
        parser.add_argument(f'--{name}.{field.name}', type=kind, default=DEFAULTS.get(f'{name}.{field.name}'))


def settings_of(options: argparse.Namespace, name: str) -> Any:
    """The dataclass of the flags of that name; None where none was given."""
    given = {
        flag.removeprefix(f'{name}.'): value
        for flag, value in vars(options).items()
        if flag.startswith(f'{name}.') and value is not None
    }
    return from_config_dict(SETTINGS[name], given, f'--{name}') if given else None


@contextlib.contextmanager
def completing(options: argparse.Namespace) -> Iterator[tuple[Complete, str, int]]:
    """The model that was asked for, the name of all that decides its answers, and the number of chats for a call."""
    sampling, endpoint = settings_of(options, 'sampling'), settings_of(options, 'endpoint')
    sampled = f'max_tokens={options.max_tokens} {sampling}'
    if endpoint is not None:
        path = pathlib.Path(f'{options.output}.answers.sqlite')
        with Cache(path) as cache, Endpoint(endpoint, cache=cache) as client:
            complete = complete_at(client, max_tokens=options.max_tokens, sampling=sampling, version=VERSION)
            named = f'{endpoint.model} {endpoint.extra} {sampled}'.replace('  ', ' ')
            try:
                yield complete, named, CALLS * endpoint.in_flight
            finally:
                print_usage(endpoint.model, client)
        return
    if sampling.top_k or sampling.min_p:
        raise ValueError('--sampling: expected temperature and top_p alone beside --model, found top_k or min_p')
    identity = identity_of(options.model)
    with replying(complete_on_device, options, sampling, options.max_tokens) as complete:
        yield complete, f'{identity} seed={options.seed} {jax.default_backend()} {sampled}', options.rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, type=local_path, help='conversations: .jsonl, .jsonl.gz or .parquet')
    parser.add_argument('--output', required=True, type=local_path, help='file to write, in the same formats')
    parser.add_argument('--model', help='a model on the device: OWNER/MODEL, a folder or a .gguf file')
    parser.add_argument(
        '--max-tokens', '--max_tokens', type=int, help=f'of an answer, reasoning included; by default {MAX_TOKENS}'
    )
    parser.add_argument('--tries', type=int, default=4, help='max answers until one is a sentence; 1 at temperature 0')
    add_device_flags(parser)
    for name, kind in SETTINGS.items():
        add_fields(parser, name, kind)
    options = parser.parse_args(arguments)
    has_endpoint = any(name.startswith('endpoint.') and x is not None for name, x in vars(options).items())
    if has_endpoint == (options.model is not None):
        parser.error('expected either --endpoint.url and --endpoint.model, or --model')
    if options.max_tokens is None:
        options.max_tokens = MAX_TOKENS['endpoint' if has_endpoint else 'device']
    with one_line_errors():
        if options.tries < 1:
            raise ValueError(f'--tries: expected at least 1, found {options.tries}')
        if options.output.resolve() == options.data.resolve():
            raise ValueError(f'--output: expected another file than --data, found {options.output} twice')
        check_data(options.data)
        conversations, _ = read_conversations(options.data)
        settings = settings_of(options, 'intents') or IntentSettings()
        tries = 1 if settings_of(options, 'sampling').temperature == 0 else options.tries
        with completing(options) as (complete, model, batch_size):
            counts, again = write_intents(
                conversations, options.output, complete, settings, model=model, batch_size=batch_size, tries=tries
            )
    written = counts.pop('written')
    done = 'written' if written else 'not written'
    print(f'{options.output}: {done}, {written} of {len(conversations)} conversations')
    for what, causes in (('left out', counts), ('asked again', again)):
        for cause, count in causes.most_common():
            print(f'{what}: {count} ({cause})')
    if not written:
        sys.exit('error: expected a sentence of at least one conversation, found none')


if __name__ == '__main__':
    run_program(main)
