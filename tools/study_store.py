"""Backs up and restores the store of a study, and says what is in it; its server may run meanwhile.

    python -m tools.study_store show --store=sqlite:///study.sqlite
    python -m tools.study_store backup --store=sqlite:///study.sqlite --output=backup.sqlite
    python -m tools.study_store restore --backup=backup.sqlite --store=sqlite:///restored.sqlite
    python -m tools.study_store delete --store=sqlite:///study.sqlite --panel-id=PROLIFIC_PID
    python -m tools.study_store migrate --store=sqlite:///study.sqlite --revision=REVISION

A store is sqlite:///FILE or postgresql://USER@HOST/NAME; `restore` wants one that does not exist yet (PostgreSQL: an
empty database). A backup is a state of one moment in one SQLite file, of a PostgreSQL store too, and is a store itself:
`show` and the report read it, the server serves from it. Do not copy the file of a running study by other means: its
latest answers are in FILE-wal.

The last two want a store that no server has open. `delete` deletes the data of somebody who asks for it by mail, as the
study's own pages do: that they came is all that stays. `migrate` brings a store to a revision of its tables, for
instance for an earlier version of simrl; the server itself brings an older store up to date when it opens it.

To go back to a backup: stop the server, restore into a new store, start the server with `--config.store` of that one.
Cookies and links of participants stay valid; what they answered after the backup was made is lost to the study. A
backup contains the panel's ids, the secret that signs cookies, and all who had their data deleted since: keep it as
you keep the store, and delete it when they ask for that, or their data (`delete`) after restoring it.
"""

import argparse
import collections
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Literal

from simrl.run.config import local_path
from simrl.run.program import run_program


def show(url: str) -> dict[str, object]:
    """Counts what is in a store, all of which is read and folded."""
    from simrl.study import database, store
    from simrl.study.participant import fold_all

    events = store.read_events(url)
    counts = collections.Counter(f'{state.mode}: {state.outcome or state.step}' for state in fold_all(events).values())
    return {'revision': database.latest(), 'events': len(events), 'participants': dict(counts)}


def delete(url: str, mode: Literal['live', 'rehearsal'], panel_id: str) -> dict[str, object]:
    """Deletes the data of a participant by the panel's id."""
    from simrl.study.store import Identity, Store, StoreError

    with Store(url, mode) as store:
        found = store.find(Identity(panel_id, '', ''), mode)
        if found is None:
            raise StoreError(f'{url}: expected the panel id of a participant, found {panel_id!r}')
        events = [event for event in store.events() if event.participant == found[0]]
        store.delete(found[0], events[-1].version + 1, time.time())
        return {'participant': found[0], 'events deleted': len(events) - 1}


def migrate(url: str, revision: str) -> dict[str, object]:
    from simrl.study import database

    address = database.parse(url)
    lock = database.lock_file(address)
    try:
        with database.connect(address, 'write') as connection:
            database.lock_session(address, connection)
            with database.translated(address), connection.begin():
                if (found := database.revision(connection)) is None:
                    raise database.StoreError(f'{url}: expected a store, found an empty database')
                database.migrate(connection, revision)
                return {'from': found, 'to': database.revision(connection)}
    finally:
        if lock is not None:
            lock.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(dest='tool', required=True)
    for name in ('show', 'backup', 'restore', 'delete', 'migrate'):
        tool = tools.add_parser(name)
        tool.add_argument('--store', required=True, help='sqlite:///FILE or postgresql://USER@HOST/NAME')
        if name == 'backup':
            tool.add_argument('--output', required=True, type=local_path, help='new file')
        elif name == 'restore':
            tool.add_argument('--backup', required=True, type=local_path, help='file of `backup`')
        elif name == 'delete':
            tool.add_argument('--panel-id', required=True, help='PROLIFIC_PID, as it was in their link')
            tool.add_argument('--mode', choices=('live', 'rehearsal'), default='live', help='of the store')
        elif name == 'migrate':
            tool.add_argument('--revision', default='head', help='default: the latest')
    options = parser.parse_args(arguments)
    try:
        from simrl.study import backup
        from simrl.study.store import StoreError
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: pip install 'simrl[study]'")
    try:
        done: object
        match options.tool:
            case 'show':
                done = show(options.store)
            case 'backup':
                done = backup.backup(options.store, pathlib.Path(options.output))
            case 'restore':
                done = backup.restore(pathlib.Path(options.backup), options.store)
            case 'delete':
                done = delete(options.store, options.mode, options.panel_id)
            case _:
                done = migrate(options.store, options.revision)
    except (StoreError, ValueError) as error:  # ValueError: events that cannot follow, ids that no panel has
        sys.exit(f'error: {error}')
    print(json.dumps(done, indent=1))


if __name__ == '__main__':
    run_program(main)
