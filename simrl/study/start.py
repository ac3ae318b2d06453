"""Start a study: all that can be wrong is found before anybody is let in, and nothing is half started."""

import asyncio
import os
import socket
from collections.abc import Callable

from simrl.remote.settings import read_key
from simrl.run.config import differences
from simrl.serving.listener import Server, bind, make_server, raise_file_limit, url_of
from simrl.study import panel
from simrl.study.admin import make_router
from simrl.study.app import make_app
from simrl.study.events import Opened
from simrl.study.models import open_models
from simrl.study.running import Running
from simrl.study.settings import CODES, PanelSettings, StudySettings, WebSettings
from simrl.study.store import Store, StoreError
from simrl.study.text_files import read_tasks, read_texts
from simrl.study.texts import Tasks
from simrl.study.web import Web, http_limits

LEAST_TOKEN = 16  # characters of the administrators' token
WATCH_SECONDS = 1.0  # between two looks at the store
PANEL_LINK = '/enter?PROLIFIC_PID={{%PROLIFIC_PID%}}&STUDY_ID={{%STUDY_ID%}}&SESSION_ID={{%SESSION_ID%}}'
Say = Callable[[str], None]


def serve(settings: StudySettings, say: Say) -> None:
    """Runs a study until SIGTERM or SIGINT.

    1. The token, tasks and texts are read, and the address is taken; connections are refused for now. 2. The store is
    opened. 3. Models are started or asked. 4. Replies that were under way are asked for again, and pages are served.
    At the end requests and replies have `drain_seconds` to finish; a reply that takes longer is asked for at the next
    start.

    Args:
        say: takes lines for whoever started it: the addresses, once they can be opened.

    Raises:
        OSError: the address is taken.
        ValueError: the token is missing, or a live study's texts are not complete. TextError: a file of them is wrong.
        StoreError: the store cannot be opened, or was lost for so long that the server ended.
        EndpointError: a model cannot be reached or cannot read what people write, or the judge's key is missing.
    """
    token = read_admin_token(settings.web)
    if settings.screen is not None:
        read_key(settings.screen)  # or the judge would be refused once the study is over
    tasks, texts = read_tasks(settings.tasks), read_texts(settings.texts)
    if settings.mode == 'live' and (empty := texts.unfilled()):
        names = ', '.join(f'fields.{name}' for name in empty)
        raise ValueError(f'texts: expected {names} to be filled in before a live study, found nothing')
    texts = texts.filled(settings.task)
    http = http_limits(settings.web)
    with bind(http) as listener, Store(settings.store, settings.mode) as store:
        raise_file_limit(http)
        web = Web(settings.web, texts, store.secret, token)
        asyncio.run(_serve(settings, store, tasks, web, listener, say))


def read_admin_token(settings: WebSettings) -> str:
    """The administrators' token from the environment.

    Raises:
        ValueError: it is missing or short. It is never shown.
    """
    token = os.environ.get(settings.admin_variable, '').strip()
    if len(token) < LEAST_TOKEN:
        raise ValueError(
            f"WebSettings.admin_variable: expected the administrators' token in the environment variable "
            f'{settings.admin_variable}, at least {LEAST_TOKEN} characters, found {len(token)}'
        )
    return token


async def _serve(
    settings: StudySettings, store: Store, tasks: Tasks, web: Web, listener: socket.socket, say: Say
) -> None:
    base = url_of(listener).removesuffix('/v1')
    say(f'{settings.name}: {settings.mode}, store {settings.store}; starting the models')
    for doubt in doubts(settings):
        say(f'warning: {doubt}')

    def announce() -> None:
        entry = PANEL_LINK if settings.panel.entry == 'panel' else '/enter'
        say(f'{base}/admin is for administrators\n{base}{entry} is for participants')

    async with open_models(settings, say, tasks.types[0].tasks[0].title) as (ask, moderate):
        running = Running(settings, store, tasks, web.texts, ask, moderate)
        await running.start()
        for change in changes(running):
            say(f'warning: since the last start {change}')
        try:
            app = make_app(running, web, make_router(running, web), panel.make_router(running, web))
            server = make_server(app, http_limits(settings.web), on_listening=announce)
            watch = asyncio.create_task(_end_without(store, server))
            await server.serve([listener])
            watch.cancel()
            if store.lost:  # whoever started this may start it again
                raise StoreError(store.lost)
        finally:
            await running.stop()


def doubts(settings: StudySettings) -> list[str]:
    """Settings that may be meant and most often are not."""
    names, found = list(settings.models), []
    for number, name in enumerate(names):
        same = [other for other in names[:number] if settings.models[other] == settings.models[name]]
        if same:
            found.append(f'the models {same[0]} and {name} are the same')
    own, usual = settings.panel, PanelSettings()
    if settings.mode == 'live' and own.entry == 'panel':
        codes = [name for name in CODES if getattr(own, name) == getattr(usual, name)]
        if codes:
            listed = ', '.join(f'panel.{name}' for name in codes)
            found.append(f'anybody can guess codes that are not of your panel: {listed}')
    return found


def changes(running: Running) -> list[str]:
    """Fields of the config in which this start differs from the one before."""
    starts = [stored.event.config for stored in running.history.events if isinstance(stored.event, Opened)]
    return differences(starts[-2], starts[-1]) if len(starts) > 1 else []


async def _end_without(store: Store, server: Server) -> None:
    """Ends the server once its store is lost for good."""
    while not store.lost:
        await asyncio.sleep(WATCH_SECONDS)
    server.handle_exit()
