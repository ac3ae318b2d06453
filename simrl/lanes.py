"""What a job is, as the processes that run its stages see it."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from simrl.stages import Task


def _nothing(_: Any, __: pathlib.Path) -> None:
    """The end of a job that leaves nothing but its stages."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What `config.job` names. Its functions are importable by name: other processes call them as well.

    Attributes:
        settings: the dataclass of the job's config.
        tasks: (settings, run directory) -> the stages, each after those that it reads.
        finish: (settings, run directory), called once all stages are done: what is made of all of them.
        lanes: settings -> how many stages run side by side. None: one after the other, and it is an error if another
            process works in the run directory.
        exempt: dotted fields that may change in a run that goes on; see `stages.open_workdir`.
    """

    settings: type[Any]
    tasks: Callable[[Any, pathlib.Path], list[Task]]
    finish: Callable[[Any, pathlib.Path], None] = _nothing
    lanes: Callable[[Any], int] | None = None
    exempt: tuple[str, ...] = ()
