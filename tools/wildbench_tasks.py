"""Tasks of WildBench as tools of the command line read them, and the replies to them."""

import argparse
import dataclasses
import pathlib

from simrl.conversations.records import read_conversations
from simrl.evaluation.wildbench.generations import Generation, missing, read_generations
from simrl.evaluation.wildbench.tasks import NO_TASK, Overlap, Task, overlap_of, read_tasks
from simrl.run.config import local_path


@dataclasses.dataclass(frozen=True)
class Scope:
    """Tasks that numbers are of.

    Attributes:
        tasks: by id; None: no tags, and nothing is known of those that the file lacks.
        dropped: ids of rows that are no tasks.
        overlap: with training data; None: not measured.
    """

    tasks: dict[str, Task] | None = None
    dropped: frozenset[str] = frozenset()
    overlap: Overlap | None = None

    @property
    def known(self) -> dict[str, Task]:
        """The tasks, without which nothing can be asked, or left in a run."""
        if self.tasks is None:
            raise ValueError('--tasks: expected a hub name, a file or a folder, found none')
        return self.tasks


def add_task_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    """--tasks, and what belongs to it; `default`: the source, None for no tasks."""
    parser.add_argument('--tasks', default=default, help=f'hub name, file or folder; default: {default or "no tags"}')
    parser.add_argument('--revision', help='of tasks on the hub; default: the main branch')
    parser.add_argument('--on_bad_rows', choices=('raise', 'drop'), default='raise', help='of the tasks')
    told = 'conversations whose split train was trained on; may be repeated'
    parser.add_argument('--training', type=local_path, action='append', default=[], help=told)


def read_scope(options: argparse.Namespace) -> Scope:
    """The tasks of --tasks, and their overlap with --training; prints how many, and what was changed or dropped.

    Raises:
        ValueError: there is --training alone, or a file of it has no conversation to train on.
    """
    if not options.tasks:
        if options.training:
            raise ValueError('--training: expected --tasks beside it, found none')
        return Scope()
    tasks, counts, dropped = read_tasks(options.tasks, on_bad_rows=options.on_bad_rows, revision=options.revision)
    print(f'{options.tasks}: {len(tasks)} tasks', flush=True)
    for what, count in sorted(counts.items()):
        print(f'  {what}: {count}')
    found = []
    for path in options.training:
        openings = [of.opening for of in read_conversations(path)[0] if of.split == 'train']
        if not openings:
            raise ValueError(f'{path}: expected conversations of the split train, found none')
        print(f'{path}: {len(openings)} conversations of the split train', flush=True)
        found += openings
    overlap = overlap_of(tasks, found) if found else None
    if overlap is not None:
        print(f'tasks that these have: {len(overlap.ids)}', flush=True)
    return Scope(tasks, dropped, overlap)


def read_replies(path: pathlib.Path, scope: Scope) -> dict[str, Generation]:
    """The replies of a result file; prints how many tasks have none, and how many replies are to no task."""
    found, left_out = read_generations(path, scope.known, scope.dropped)
    more = f'; left out: {left_out} ({NO_TASK})' if left_out else ''
    print(f'{path}: {len(found)} replies; tasks without one: {len(missing(scope.known, found))}{more}', flush=True)
    return found
