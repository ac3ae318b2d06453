"""Rendered rows in a file of their stage, so that a stage that resumes does not tokenise its data again.

The file belongs to a stage that has started: the settings and inputs that decide the rows cannot change any more. The
stage deletes it at its end.
"""

import collections
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simrl.conversations.views import PreferenceRow, Rendered
from simrl.run import processes
from simrl.run.stage_files import NEW_SUFFIX

FIELDS = ('tokens', 'role', 'message', 'trained')

Counts = collections.Counter[str]


def kept_rows(path: pathlib.Path, render: Callable[[], tuple[list[Rendered], Counts]]) -> tuple[list[Rendered], Counts]:
    """Reads the rows and counts of a file; without one, or with a damaged one, renders and writes them."""
    if path.exists():
        try:
            with np.load(path) as stored:
                ends, counts = np.cumsum(stored['lengths']), collections.Counter(json.loads(str(stored['counts'])))
                columns = [np.split(stored[field], ends[:-1]) for field in FIELDS]
            return [Rendered(*parts) for parts in zip(*columns, strict=True)] if len(ends) else [], counts
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            print(f'{path}: expected the rows of this stage, found {error}; they are rendered again', flush=True)
    rows, counts = render()
    if not processes.leads():
        return rows, counts
    try:
        _write(path, rows, counts)
    except OSError as error:  # a full disk; what needs the disk more says so itself
        print(f'{path}: not written ({error.strerror or error}); a resumed stage renders its rows again', flush=True)
    return rows, counts


def kept_pairs(
    path: pathlib.Path, render: Callable[[], tuple[list[PreferenceRow], Counts]]
) -> tuple[list[PreferenceRow], Counts]:
    """`kept_rows` of pairs."""

    def flat() -> tuple[list[Rendered], Counts]:
        pairs, counts = render()
        return [row for pair in pairs for row in (pair.chosen, pair.rejected)], counts

    rows, counts = kept_rows(path, flat)
    return [PreferenceRow(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)], counts


def _write(path: pathlib.Path, rows: Sequence[Rendered], counts: Counts) -> None:
    new = path.with_name(f'{path.name}.{os.getpid()}{NEW_SUFFIX}')
    none = Rendered(np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int16), np.zeros(0, np.bool_))
    arrays: dict[str, Any] = {field: np.concatenate([getattr(row, field) for row in (none, *rows)]) for field in FIELDS}
    with new.open('wb') as file:
        np.savez(file, lengths=[len(row) for row in rows], counts=json.dumps(counts), **arrays)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
