"""A server that is killed at any moment has stored what it confirmed, once; the next one goes on from there."""

import collections
import pathlib
import random
import subprocess
import sys
import threading
import time

import pytest

from simrl.study.events import Arrived, Voided
from simrl.study.store import ConflictError, Entry, Store
from tests.study.appender import cause

ROOT = pathlib.Path(__file__).parents[2]


def append_until_killed(url: str, lines: int, delay: float) -> list[tuple[str, int]]:
    """The confirmed events of a process that is killed `delay` seconds after it confirmed a number of them."""
    command = [sys.executable, '-m', 'tests.study.appender', url]
    confirmed: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            confirmed.append(line)
            if len(confirmed) == lines:
                break
        time.sleep(delay)
        process.kill()
        confirmed += process.stdout.read().splitlines()
        errors = process.stderr.read()
    assert not errors
    found = []
    for line in confirmed:
        participant, version = line.split()
        found.append((participant, int(version)))
    return found


def check_confirmed(url: str, before: dict[str, int], confirmed: list[tuple[str, int]]) -> dict[str, int]:
    """Each participant's number of events, of which `before` were stored and these were confirmed since.

    All are as they were, and one more at most follows, which was stored and not confirmed any more.
    """
    with Store(url, 'live') as store:
        events = store.events()
        for identity in store.identities().values():
            assert store.find(identity, 'live') == (identity.panel_id, identity)
        assert set(store.identities()) == {event.participant for event in events}
    counts = collections.Counter(event.participant for event in events)
    for event in events:
        expected = Arrived('live') if event.version == 1 else Voided(cause(event.participant, event.version))
        assert event.event == expected
    for participant in counts.keys() | {name for name, _ in confirmed}:
        found = [event.version for event in events if event.participant == participant]
        assert found == list(range(1, len(found) + 1))
        versions = [version for name, version in confirmed if name == participant]
        first = before.get(participant, 0) + 1
        assert versions == list(range(first, first + len(versions)))
        assert len(found) - (first - 1 + len(versions)) in (0, 1)
    return counts


@pytest.mark.parametrize('kills', [1, pytest.param(25, marks=pytest.mark.long)])
def test_what_was_confirmed_survives_kills(store_url, kills):
    drawn = random.Random(kills)
    counts: dict[str, int] = {}
    for _ in range(kills):
        confirmed = append_until_killed(store_url, drawn.randint(1, 60), drawn.uniform(0, 0.01))
        counts = check_confirmed(store_url, counts, confirmed)
    assert sum(counts.values()) > kills


def test_a_database_that_restarts_loses_and_doubles_nothing(postgres):
    """PostgreSQL is stopped at once and started again under three writers, who wait for it."""
    url = postgres.database()
    confirmed: list[tuple[str, int]] = []
    stop = threading.Event()

    def work(participant: str) -> None:
        version = 0
        while not stop.is_set():
            version += 1
            [stored] = store.append([Entry(participant, version, 1.0, (Voided(cause(participant, version)),))])
            assert not isinstance(stored, ConflictError)
            confirmed.append((participant, version))

    with Store(url, 'live') as store:
        threads = [threading.Thread(target=work, args=(f'p{n}',)) for n in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                before = len(confirmed)
                while len(confirmed) < before + 20:
                    assert all(thread.is_alive() for thread in threads)
                    time.sleep(0.001)
                postgres.stop()
                postgres.start()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        stored = [(event.participant, event.version) for event in store.events()]
    assert sorted(stored) == sorted(confirmed)
