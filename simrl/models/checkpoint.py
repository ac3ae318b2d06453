"""Checkpoints of training states: saved atomically, restored into any shardings.

Only this file uses Orbax. A checkpoint is a folder named by its step, with the state's arrays and a JSON `meta` (sizes
of the run's files, sums that are not logged yet). It is written under a temporary name and renamed when complete, so a
kill at any moment leaves older checkpoints intact. Incomplete checkpoints are deleted when the folder is opened again.
Saving is synchronous, so that an error (a full disk) is raised at its own step.

Several processes save and restore together, each its own shards, in one folder that all of them see. A checkpoint can
be restored by another number of processes and on another mesh: the shards are those of the state that is asked for.

A state has no random keys: randomness is a function of the step.
"""

import logging
import pathlib
import re
import shutil
import tempfile
import time
import uuid
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from simrl.run import processes, stage_files
from simrl.run.stage_files import PLACE_FILE

T = TypeVar('T')

UNREADABLE = re.compile(r'[*?\[\\]')  # in a path: Orbax takes it for a pattern, TensorStore \ for a separator


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class Checkpoints:
    """Checkpoints of one run, in a folder that no other run writes to. In several processes each call is one of all.

    Args:
        folder: created if missing. Incomplete checkpoints in it are deleted.
        keep: number of newest checkpoints to keep.
        elsewhere: a folder, or the URL of one in a bucket (`gs://BUCKET/FOLDER`, with the package gcsfs), in which the
            checkpoints get a folder of their own; `folder` has its name. None: they are in `folder`. Where checkpoints
            are saved already, this changes nothing.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int, elsewhere: str | None = None) -> None:
        self._folder = _place(pathlib.Path(folder).absolute(), elsewhere)
        self._plain: tempfile.TemporaryDirectory[str] | None = None
        logging.getLogger('absl').addFilter(_quiet)
        with _reported(f'could not open the checkpoints in {self._folder}'):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self._plain_path(), options=options)
        first = processes.broadcast('the steps of checkpoints', self.steps)
        if self.steps != first:
            raise CheckpointError(
                f'{self._folder}: expected the checkpoints that process 0 finds, of steps {first}, found {self.steps}: '
                'all processes need one folder, on a file system that they share'
            )

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()
        self._remove_unfinished()  # of a failed save, whose threads have ended now
        if self._plain is not None:
            self._plain.cleanup()

    def _plain_path(self) -> pathlib.Path:
        """The folder, by a path that Orbax can read: a link to it, where its own path has special characters."""
        if _is_url(self._folder) or not UNREADABLE.search(str(self._folder)):
            return self._folder
        self._plain = tempfile.TemporaryDirectory(prefix='simrl-')
        link = pathlib.Path(self._plain.name) / 'checkpoints'
        link.symlink_to(self._folder, target_is_directory=True)
        return link

    @property
    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes a checkpoint and deletes the oldest ones past `keep`.

        Args:
            step: later than any checkpoint in the folder.
            state: a pytree of arrays.
            meta: JSON-able.

        Raises:
            CheckpointError: the checkpoint could not be written, or `step` is not new. Older checkpoints are intact.
        """
        arrays = _flatten(state)
        if self.steps and step <= self.steps[-1]:
            raise CheckpointError(f'{self._folder}: expected a step after {self.steps[-1]}, found {step}')
        tree = {name: _describe(array) for name, array in arrays.items()}
        needed = sum(array.nbytes for array in arrays.values())
        free = needed if _is_url(self._folder) else shutil.disk_usage(self._folder).free
        free = processes.broadcast('the free bytes of the disk', free)
        if free < needed:
            raise CheckpointError(
                f'could not save step {step} in {self._folder}: the disk is full: expected {needed:,} bytes, '
                f'found {free:,}; the older checkpoints {self.steps} are intact'
            )
        contents = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave({'tree': tree, 'meta': meta})
        )
        try:
            with _reported(
                f'could not save step {step} in {self._folder} (is the disk full?); the older checkpoints '
                f'{self.steps} are intact, and the same command resumes from them'
            ):
                if not self._manager.save(step, args=contents, force=True):
                    raise RuntimeError('orbax declined to save')
        except CheckpointError:
            self._remove_unfinished()
            raise

    def restore(self, like: T, step: int | None = None) -> tuple[int, T, dict[str, Any]] | None:
        """Reads the state at `step` (None: the latest), with its step and meta; None without any checkpoint.

        Args:
            like: a state of arrays or `jax.ShapeDtypeStruct`s with the wanted structure, shapes, dtypes and shardings.

        Raises:
            CheckpointError: no such step, an unreadable checkpoint, or another structure.
        """
        steps = self.steps
        if not steps:
            return None
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f'{self._folder}: expected a checkpoint of step {step}, found steps {steps}')
        folder = self._folder / str(step)
        earlier = 'the previous checkpoint' if steps.index(step) else 'the start: there is no earlier checkpoint'
        advice = f'could not read {folder}; delete that folder to resume from {earlier}'
        if processes.count() > 1:  # the fault may be that of another process, which was lost
            advice = f'could not read {folder}; if no process was lost, delete that folder to resume from {earlier}'
        with _reported(advice):
            stored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
        wanted = {name: ocp.utils.to_shape_dtype_struct(array) for name, array in _flatten(like).items()}
        _check_tree(folder, stored['tree'], {name: _describe(array) for name, array in wanted.items()})
        with _reported(advice):
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays['state'][name] for name in wanted])
        return step, state, stored['meta']

    def _remove_unfinished(self) -> None:
        """Deletes incomplete checkpoints; after a failed save they may fill the disk.

        Threads of a failed save go on writing for a moment, so a folder may need to be removed more than once.
        """
        if jax.process_index() != 0:
            return
        deadline = time.monotonic() + 5
        while unfinished := list(self._folder.glob('*.orbax-checkpoint-tmp*')):
            for path in unfinished:
                if _is_url(path):
                    epath.Path(path).rmtree(missing_ok=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)


def _place(folder: pathlib.Path, elsewhere: str | None) -> pathlib.Path:
    """The place of a folder's checkpoints, as process 0 knows it; a path in a bucket has the methods of one here."""
    place = str(folder)
    if processes.leads():
        stored = stage_files.read_json(folder / PLACE_FILE)
        if stored is not None:
            place = stored['folder']
        elif elsewhere is not None and not any(folder.glob('[0-9]*')):
            place = f'{elsewhere.rstrip("/")}/{folder.parent.name}-{uuid.uuid4().hex[:12]}'
            folder.mkdir(parents=True, exist_ok=True)
            stage_files.write_json(folder / PLACE_FILE, {'folder': place})
    place = processes.broadcast('the place of checkpoints', place)
    found: pathlib.Path = epath.Path(place) if '://' in place else pathlib.Path(place)
    return found


def _is_url(path: pathlib.Path) -> bool:
    return '://' in str(path)


class _reported:  # noqa: N801  (a context manager)
    """Turns errors of orbax, tensorstore or the system into a CheckpointError that names the failed action."""

    def __init__(self, message: str) -> None:
        self._message = message

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            reason = ' '.join(str(error).split())
            raise CheckpointError(f'{self._message}: {type(error).__name__}: {reason[:500]}') from error


def _quiet(record: logging.LogRecord) -> bool:
    """Drops orbax's log: it warns about formats at every save, and its errors are raised anyway."""
    return 'orbax' not in pathlib.Path(record.pathname).parts


def _flatten(state: Any) -> dict[str, Any]:
    """Lists leaves by dotted path, in the order of the tree."""
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator='.')
        if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
            raise TypeError(f'state.{name}: expected an array, found {type(leaf).__name__}')
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f'state.{name}: expected no random keys in a state (randomness is a function of the step)')
        if name in arrays:
            raise ValueError(f'state.{name}: two leaves have this path')
        arrays[name] = leaf
    return arrays


def _describe(array: Any) -> str:
    return f'{array.dtype}[{",".join(map(str, array.shape))}]'


def _check_tree(folder: pathlib.Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    problems = [
        f'{name}: expected {wanted.get(name, "nothing")}, found {stored.get(name, "nothing")}'
        for name in [*wanted, *(name for name in stored if name not in wanted)]
        if wanted.get(name) != stored.get(name)
    ]
    if problems:
        more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
        raise CheckpointError(f'{folder}: the checkpoint has another structure: {"; ".join(problems[:8])}{more}')
