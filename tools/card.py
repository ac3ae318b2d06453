"""Writes the card of a run's simulator: card.json, and card.html to read.

    python -m tools.card RUN ARM [--output=FOLDER]

RUN is a run directory, finished or not; ARM is one of its arms, whatever its simulator: prompted, fine-tuned, loaded by
name, behind an endpoint, or your own. The card has what the simulator is, its utility, the transfer of its assistants'
gains, its fidelity, its failures and its cost. What was not measured is named, with the setting that measures it. The
default of FOLDER is RUN/cards/ARM.
"""

import argparse
import sys
from collections.abc import Sequence

from simrl.evaluation.report.card_page import document
from simrl.evaluation.report.report import write_page
from simrl.experiments.cards import simulator_card
from simrl.main import USER_ERRORS
from simrl.run import config
from simrl.run.config import ConfigError, local_path
from simrl.run.program import run_program
from simrl.run.runtime import start_backend
from simrl.run.stage_files import write_json
from simrl.serving.load import find_run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        'python -m tools.card', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('run', type=local_path, help='a run directory')
    parser.add_argument('arm', help='an arm of the run')
    parser.add_argument('--output', type=local_path, metavar='FOLDER', help='default: RUN/cards/ARM')
    options = parser.parse_args(arguments)
    try:
        start_backend()
        found = find_run(options.run)
        if found is None or found[1] != '.':
            raise ConfigError(f'{options.run}: expected a run directory, with a config.json of simrl, found none')
        card = simulator_card(found[0], options.arm)
        folder = options.output or options.run / 'cards' / options.arm
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / 'card.json', config.to_dict(card))
        write_page(folder / 'card.html', document(card))
    except USER_ERRORS as error:
        sys.exit(f'error: {error}')
    print(f'{folder}: card.json and card.html written')


if __name__ == '__main__':
    run_program(main)
