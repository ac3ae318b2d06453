"""Start the server: its address, then its models, and only then does it listen."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from simrl.conversations.chat import Chat
from simrl.run.runtime import numeric_defaults
from simrl.serving.engine import Engine, run
from simrl.serving.generation import Constraint
from simrl.serving.jobs import Served
from simrl.serving.listener import bind, make_server, raise_file_limit, url_of
from simrl.serving.load import find_model
from simrl.serving.server import make_app
from simrl.serving.settings import ServeSettings
from simrl.serving.structured import Grammars, MissingPackageError

LINE_SECONDS = 15.0  # between two lines on programs


def serve(settings: ServeSettings) -> None:
    """Serves models until SIGTERM or SIGINT.

    1. The address is taken; a connection is refused for now. 2. All models are found. 3. One after the other they are
    loaded, and their programs compiled. 4. The server listens, and prints its URL.

    Raises:
        OSError: the address is taken.
        FileNotFoundError, ValueError, WorkdirError: no such model, or a setting that does not fit it.
    """
    settings.http.read_key()
    sources = settings.sources()
    with bind(settings.http) as listener:
        found = {name: find_model(source) for name, source in sources.items()}
        wake, stop = threading.Condition(), threading.Event()
        engines, models = list[Engine](), dict[str, Served]()
        for name, load in found.items():
            print(f'{name}: loading', flush=True)
            model = load()
            programs = settings.engine.shapes(model.policy.spec.config).programs
            engine = Engine(
                model.policy,
                model.chat,
                settings.engine,
                wake,
                knows_terminal=model.knows_terminal,
                on_program=counter(name, programs),
            )
            engines.append(engine)
            constrain = constraints(model.chat, model.policy.spec.config.padded_vocab_size)
            models[name] = Served(
                name=name, chat=model.chat, serving=engine, created=int(time.time()), constrain=constrain
            )
        raise_file_limit(settings.http)

        def announce() -> None:
            print(f'{url_of(listener)} serves {", ".join(models)}', flush=True)

        server = make_server(make_app(models, settings.http), settings.http, on_listening=announce)

        def step() -> None:
            with numeric_defaults():  # they are a thread's own
                run(engines, wake, stop)

        def end(_: object) -> None:
            server.handle_exit()
            server.handle_exit()  # without its engines the server cannot finish an answer

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stepping = pool.submit(step)
            stepping.add_done_callback(end)
            try:
                server.run([listener])
            finally:
                stop.set()
                with wake:
                    wake.notify_all()
            stepping.result()


def counter(name: str, programs: int) -> Callable[[], None]:
    """The function that is called after each of a model's compiled programs: it prints how far they are.

    The time that is left is not estimated: one program takes a hundred times as long as another, and those that the
    compilation cache has take none.
    """
    begun = shown = time.monotonic()
    done = 0

    def count() -> None:
        nonlocal shown, done
        now, done = time.monotonic(), done + 1
        if now - shown >= LINE_SECONDS or done == programs:
            shown = now
            print(f'{name}: compiled {done} of {programs} programs in {now - begun:.0f} s', flush=True)

    return count


def constraints(chat: Chat, num_rows: int) -> Callable[[Mapping[str, Any]], Constraint]:
    """The function from a JSON schema to the constraint of an answer.

    Where no schema can be followed, it raises a ValueError that says why.
    """
    try:
        return Grammars.of(chat, num_rows).constraint
    except (MissingPackageError, ValueError) as error:
        reason = str(error)

    def refuse(_: Mapping[str, Any]) -> Constraint:
        raise ValueError(reason)

    return refuse
