"""Kills a study's server at random moments while participants are in it, and starts it again."""

import asyncio
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from simrl.study.store import read_events
from simrl.study.text_files import read_texts
from tests.remote.server import Body, ScriptedServer, chat_reply
from tools.rehearse.account import differences
from tools.rehearse.people import Scripted
from tools.rehearse.run import walk_all
from tools.rehearse.walk import Habits, Place, Walk

LONGEST = 4.0  # seconds from the server's first answer to its kill
HABITS = Habits(leave=0.002, double=0.1, reload=0.05, back=0.05, device=0.05, fail=0.05)
ADMIN = 'administrators-know-this'
MOST_WAVES = 100


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it: the participants' walks, times at which nobody could go on, and differences from the store."""

    walks: tuple[Walk, ...]
    kills: int
    events: int
    wrong: tuple[str, ...]


class Server:
    """`python -m tools.study` in a process of its own, at one port."""

    def __init__(self, models: str, store: str, log: pathlib.Path) -> None:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.port = free.getsockname()[1]
        self.url, self._log = f'http://127.0.0.1:{self.port}', log
        short = ('--config.task.exchanges=3', '--config.task.max_exchanges=5', '--config.task.min_words=20')
        self._command = [
            *(sys.executable, '-m', 'tools.study', f'a={models}#model', f'b={models}#model', f'--port={self.port}'),
            *('--config.mode=rehearsal', f'--config.store={store}', '--config.plan.participants=1000000', *short),
        ]
        self._environment = os.environ | {'SIMRL_STUDY_ADMIN': ADMIN}

    def start(self) -> None:
        """Returns once it answers.

        Raises:
            RuntimeError: it ended by itself; its last line is in the message.
        """
        with self._log.open('a', encoding='utf-8') as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        while True:
            if self._process.poll() is not None:
                lines = self._log.read_text(encoding='utf-8').splitlines()
                raise RuntimeError(f'expected it to run, found exit code {self._process.returncode}: {lines[-1:]}')
            try:
                with urllib.request.urlopen(f'{self.url}/health', timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """Ends it as an operator does; its exit code."""
        self._process.terminate()
        return self._process.wait(60)


def run_with_kills(folder: pathlib.Path, kills: int, participants: int, seed: int, store: str = '') -> Outcome:
    """Has waves of participants in a study until its server was killed so often, and the last wave has ended.

    Raises:
        RuntimeError: the server did not start again, or did not end by SIGTERM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store, draw = store or f'sqlite:///{folder / "study.sqlite"}', random.Random(seed)
    over, killed = threading.Event(), 0
    faults: list[str] = []

    def answer(body: object, attempt: int) -> Body:
        return chat_reply(f'**Reply** {draw.random():.9f} of some words.', seconds=draw.uniform(0.0, 0.6))

    def kill_again() -> None:
        nonlocal killed
        try:
            while killed < kills and not over.wait(draw.uniform(0.0, LONGEST)):
                server.kill()
                killed += 1
                print(f'kill {killed}: {len(read_events(store))} events', flush=True)
                server.start()
        except Exception as error:  # of a thread: told below
            faults.append(f'{type(error).__name__}: {error}')

    walks: list[Walk] = []
    wrong: list[str] = []
    with ScriptedServer(answer) as models:
        server = Server(models.url, store, folder / 'server.log')
        place = Place(server.url, read_texts(), least=20)
        server.start()
        killer = threading.Thread(target=kill_again)
        killer.start()
        try:
            for wave in range(MOST_WAVES):
                people = [Scripted(random.Random(f'{seed} {wave} {number}')) for number in range(participants)]
                found, stopped = asyncio.run(
                    walk_all(place, people, HABITS, at_once=participants, seed=seed + 1000 * wave)
                )
                walks += found
                wrong += stopped
                if killed == kills or faults:
                    break
        finally:
            over.set()
            killer.join()
            if not faults and (code := server.stop()):
                faults.append(f'expected exit code 0 after SIGTERM, found {code}')
    if faults:
        raise RuntimeError('; '.join(faults))
    events = read_events(store)
    return Outcome(tuple(walks), killed, len(events), (*wrong, *differences(walks, events)))
