"""Appends events of several participants to a store until it is killed, and prints each that is confirmed.

    python -m tests.study.appender URL

A participant's events go on from those that are stored. A line is `participant version`.
"""

import itertools
import os
import sys
import threading

from simrl.study.events import Stored, Voided
from simrl.study.store import ConflictError, Entry, Identity, Store
from tests.study.studies import enter

THREADS = 3


def cause(participant: str, version: int) -> str:
    return f'{participant} has {version} ' * 20


def main(url: str) -> None:
    with Store(url, 'live') as store:
        last: dict[str, int] = {}
        for stored in store.events():
            last[stored.participant] = stored.version
        threads = [threading.Thread(target=work, args=(store, f'p{n}', last)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def work(store: Store, participant: str, last: dict[str, int]) -> None:
    if participant not in last:
        confirm(enter(store, Identity(participant, 's', 't'), participant, 1.0, 'live'))
    for version in itertools.count(last.get(participant, 1) + 1):
        [stored] = store.append([Entry(participant, version, float(version), (Voided(cause(participant, version)),))])
        assert not isinstance(stored, ConflictError), stored
        confirm(stored)


def confirm(events: tuple[Stored, ...]) -> None:
    for stored in events:
        os.write(1, f'{stored.participant} {stored.version}\n'.encode())


if __name__ == '__main__':
    main(sys.argv[1])
