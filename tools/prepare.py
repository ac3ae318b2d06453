"""Makes a data folder for `--config.data.folder` of published conversations and choices.

    python -m tools.prepare wildchat --source=allenai/WildChat-1M --output=DIR [--wildbench=none]
    python -m tools.prepare oasst1 --source=OpenAssistant/oasst1 --output=DIR
    python -m tools.prepare hh-rlhf --source=Anthropic/hh-rlhf --output=DIR

A source is a hub name, which is streamed, or local files of the same schema (Parquet, JSONL, a folder of them). DIR
gets conversations.jsonl.gz, of the last two also preferences.jsonl.gz, and manifest.json: settings, hashes of inputs
and outputs, and how many rows were dropped for which reason. The same command resumes a killed one. Every setting is a
flag: --toxic=keep, --splits.user=hashed_ip+country.
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.conversations import choices, wildchat
from simrl.run import config
from simrl.run.config import ConfigError, local_path
from simrl.run.program import run_program
from simrl.run.stage_files import WorkdirError

SETTINGS = {'wildchat': wildchat.WildChatSettings, 'oasst1': choices.Oasst1Settings, 'hh-rlhf': choices.HHSettings}
SOURCES = {'wildchat': wildchat.SOURCE, 'oasst1': choices.OASST1, 'hh-rlhf': choices.HH_RLHF}


def add_settings(parser: argparse.ArgumentParser, default: Any, prefix: str = '') -> None:
    """Adds a flag for every field of a dataclass, and of those in it."""
    hints = typing.get_type_hints(type(default))
    for field in dataclasses.fields(default):
        value, name = getattr(default, field.name), f'{prefix}{field.name}'
        kinds = [kind for kind in typing.get_args(hints[field.name]) if kind is not type(None)]
        if dataclasses.is_dataclass(value):
            add_settings(parser, value, f'{name}.')
        else:
            parser.add_argument(
                f'--{name}',
                dest=f'settings.{name}',
                type=kinds[0] if value is None else type(value),
                default=value,
                choices=None if value is None else kinds or None,
                help=f'default: {value}',
            )


def read_settings(cls: type[Any], options: Mapping[str, Any]) -> Any:
    """The dataclass of the flags of `add_settings`."""
    values: dict[str, Any] = {}
    for name, value in options.items():
        first, *path = name.split('.')
        if first == 'settings':
            place = values
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = value
    return config.from_config_dict(cls, values, 'settings')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(dest='tool', required=True)
    for name, cls in SETTINGS.items():
        tool = tools.add_parser(name)
        tool.add_argument('--source', default=SOURCES[name], help='hub name, file or folder')
        tool.add_argument('--revision', help='of a source on the hub; default: its main branch')
        tool.add_argument('--output', required=True, type=local_path, help='new folder, or one to resume')
        if name == 'wildchat':
            tool.add_argument(
                '--wildbench', default=wildchat.WILDBENCH, help="hub name, file or folder; 'none' leaves its tasks in"
            )
        add_settings(tool, cls())
    options = vars(parser.parse_args(arguments))
    try:
        settings = read_settings(SETTINGS[options['tool']], options)
        common = (options['source'], options['output'], settings)
        if options['tool'] == 'wildchat':
            wildbench = None if options['wildbench'] == 'none' else options['wildbench']
            made = wildchat.prepare(*common, wildbench=wildbench, revision=options['revision'])
        else:
            prepare = choices.prepare_oasst1 if options['tool'] == 'oasst1' else choices.prepare_hh_rlhf
            made = prepare(*common, revision=options['revision'])
    except (ConfigError, WorkdirError, OSError, ValueError) as error:
        sys.exit(f'error: {error}')
    print(json.dumps({key: value for key, value in made.items() if key != 'inputs'}, indent=1, ensure_ascii=False))


if __name__ == '__main__':
    run_program(main)
