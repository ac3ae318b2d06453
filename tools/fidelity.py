"""Measures how near simulators are to people, turn by turn, and how far people are from one another.

    python -m tools.fidelity RUN [--json=FILE]
    python -m tools.fidelity --people=FOLDER [--splits dev test] [--openings] [--json=FILE]

RUN is a run directory whose simulators have replayed people's conversations (`config.evaluation.replayed`), finished or
not: what is there of `replay/` and `likelihood/` is measured. `--only=replay` runs no more than that needs.
`--people` needs no run and no model: it measures the people of a file of conversations, or of conversations.jsonl.gz in
a folder, each source by itself. `pip install 'simrl[fidelity]'` installs the libraries that describe texts; what is not
installed is named as not measured.
"""

import argparse
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.conversations.records import SPLITS, read_conversations
from simrl.evaluation.fidelity.annotators import Annotators
from simrl.evaluation.fidelity.likelihood import nats_per_token
from simrl.evaluation.fidelity.measure import ALL, SourceFidelity, make_tools, measure
from simrl.evaluation.fidelity.table import ABOUT, Line, about, lines_of, text_table
from simrl.evaluation.fidelity.turns import Turn, read_turns, turns_of
from simrl.experiments.outputs import RESULT_FILE, read_result
from simrl.experiments.plan import LIKELIHOOD, REPLAY
from simrl.experiments.replays import TURNS_FILE
from simrl.run import config as config_lib
from simrl.run.config import local_path
from simrl.run.directory import CONFIG_FILE
from simrl.run.program import run_program
from simrl.run.stage_files import write_json

CONVERSATIONS = 'conversations.jsonl.gz'  # in a folder


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument('run', nargs='?', type=local_path)
    found.add_argument('--people', type=local_path, metavar='FOLDER')
    found.add_argument('--splits', nargs='+', choices=SPLITS, default=['dev', 'test'])
    found.add_argument('--openings', action='store_true', help="count people's openings among their turns")
    found.add_argument('--json', type=local_path, metavar='FILE', help='writes the numbers, too')
    for name, usual in vars(Annotators()).items():
        found.add_argument(f'--{name}', default=usual, help=f"'module:function' that makes one, or '' ({usual})")
    return found


def people_of(path: pathlib.Path, splits: Sequence[str], openings: bool) -> list[Turn]:
    """The turns of people in a file, or a folder.

    Raises:
        ValueError: there is none.
    """
    file = path / CONVERSATIONS if path.is_dir() else path
    conversations, counts = read_conversations(file, on_bad_rows='drop')
    if counts:
        print(f'{file}: rows dropped or changed: {dict(counts)}', flush=True)
    chosen = [conversation for conversation in conversations if conversation.split in splits]
    turns = [turn for one in chosen for turn in turns_of(one, first=0 if openings else 1)]
    if not turns:
        raise ValueError(f'{file}: expected turns after openings in the splits {", ".join(splits)}, found none')
    return turns


def replays_of(run: pathlib.Path) -> dict[str, list[Turn]]:
    """The replayed turns of a run, by simulator.

    Raises:
        ValueError: there is none, or no run.
    """
    files = sorted((run / REPLAY).rglob(TURNS_FILE))
    if not files and not (run / CONFIG_FILE).exists():
        raise ValueError(f'{run}: expected a run directory, with a {CONFIG_FILE} of simrl, found none')
    if not files:
        raise ValueError(
            f'{run / REPLAY}: expected replays of people, found none: the run needs config.evaluation.replayed=N'
        )
    return {file.parent.relative_to(run / REPLAY).as_posix(): read_turns(file) for file in files}


def perplexities(stage: pathlib.Path) -> dict[str, float]:
    """The perplexity of people's messages under a simulator, of all and by source; empty without a likelihood."""
    whole, by_source = nats_per_token([read_result(stage)] if (stage / RESULT_FILE).exists() else [])
    return {name: math.exp(nats.mean) for name, nats in {ALL: whole, **by_source}.items() if nats is not None}


def show(name: str, found: Mapping[str, SourceFidelity], perplexity: Mapping[str, float]) -> None:
    """Prints the measures of a simulator, or of people, by source."""
    for source, measured in found.items():
        extra: list[Line] = []
        if source in perplexity:
            extra = [('perplexity of the person', '', f'{perplexity[source]:.3f}', '')]
        print(f'\n{name}, {source}. {about(measured)}')
        print(text_table(('', 'people', 'simulator', 'excess'), [*lines_of(measured), *extra]), flush=True)


def run_fidelity(options: argparse.Namespace) -> None:
    """Measures, prints, and writes.

    Raises:
        ValueError: there is nothing to measure.
    """
    tools = make_tools(Annotators(**{name: getattr(options, name) for name in vars(Annotators())}))
    alone = options.people is not None
    read = {'people': people_of(options.people, options.splits, options.openings)} if alone else replays_of(options.run)
    written: dict[str, Any] = {}
    print(ABOUT)  # after the files are read: their errors are one line
    for name, turns in read.items():
        found = measure(turns, tools)
        show(name, found, {} if alone else perplexities(options.run / LIKELIHOOD / name))
        written[name] = found
    if options.json is not None:
        write_json(options.json, config_lib.to_dict(written))


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parser()
    options = flags.parse_args(arguments)
    if (options.run is None) == (options.people is None):
        flags.error('expected either RUN or --people=FOLDER')
    try:
        run_fidelity(options)
    except (OSError, ValueError) as error:
        flags.exit(1, f'error: {error}\n')


if __name__ == '__main__':
    run_program(main)
