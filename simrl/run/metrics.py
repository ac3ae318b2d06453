"""Metrics as (sum, weight), and the append-only files of a run: metrics.jsonl, TensorBoard events, conversations.

A metric is an unreduced sum and its weight, so that microbatches, hosts, ragged batches and logging windows agree on
the mean. A checkpoint stores the length of every file (`offsets`); a resumed run truncates the files to these lengths
(`truncate`), so that no step is written twice and none is missing.

    metrics.jsonl               one line per logged step: {"step": 10, "loss": 2.5, ..., "time/seconds": 1.2}
    tensorboard/events.out...   the same as scalars; conversations as text; hyperparameters; images
    conversations/NAME.jsonl    one line per conversation

TensorBoard reads the files of a folder in the order of their names, each once and to its end. So each process writes a
file of its own, no name is used twice, and each file starts with the first step of its process: a TensorBoard that is
open then drops that step and later ones, which a killed process wrote and no checkpoint has.

Metrics named `time/...` depend on the clock, and `endpoint/...` on what a cache answered; two runs of one config agree
on all others.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from simrl.run.stage_files import WorkdirError, named_errors

Metrics = Mapping[str, tuple[Any, Any]]  # name -> (sum, weight): scalars, on the device or off it

TIME, ENDPOINT = 'time/', 'endpoint/'
UNREPEATED = (TIME, ENDPOINT)  # how the metrics begin on which two runs of one config need not agree

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD_FOLDER = 'tensorboard'
EVENTS_NAME = 'events.out.tfevents.simrl'  # and a number; TensorBoard looks for 'tfevents' in the name
CONVERSATIONS_FOLDER = 'conversations'


def add(first: Metrics, second: Metrics) -> dict[str, tuple[Any, Any]]:
    """Adds sums and weights by name; a name that only one has is kept."""
    total = dict(first)
    for name, (value, weight) in second.items():
        if name in total:
            value, weight = total[name][0] + value, total[name][1] + weight
        total[name] = (value, weight)
    return total


def fetch(metrics: Metrics) -> dict[str, tuple[float, float]]:
    """Metrics as Python floats; waits for the device.

    Raises:
        ValueError: a sum or weight is not a scalar.
    """
    fetched = {}
    for name, (value, weight) in jax.device_get(dict(metrics)).items():
        for part, x in (('sum', value), ('weight', weight)):
            if getattr(x, 'shape', ()) != ():
                raise ValueError(f'metric {name!r}: expected a scalar {part}, found shape {x.shape}')
        fetched[name] = (float(value), float(weight))
    return fetched


def mean(metrics: Metrics) -> dict[str, float]:
    """sum / weight of each as a Python float; NaN if the weight is 0: nothing was measured."""
    return {name: value / weight if weight else math.nan for name, (value, weight) in fetch(metrics).items()}


class Writer:
    """Appends to the files of a run directory, which are opened on the first write.

    Only the first process of a run writes; in the others no method does anything.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = pathlib.Path(folder)
        self._files: dict[str, BinaryIO] = {}
        self._sizes: dict[str, int] = {}  # of the files that are open, though others may change them
        self._writes = jax.process_index() == 0
        self._first_step = 0
        self._events_file = self._new_events_file(self._existing())

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard event. A value that is not finite is null in the JSON."""
        if 'step' in values:
            raise ValueError("expected other names than 'step', which every line has")
        self._append(METRICS_FILE, _json_line({'step': step, **values}))
        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.MergeFrom(scalar_pb(name, value))
        self._append_summary(step, summary)

    def text(self, step: int, name: str, markdown: str) -> None:
        self._append_summary(step, text_pb(name, markdown))

    def image(self, step: int, name: str, png: bytes, width: int, height: int) -> None:
        """A PNG file's bytes; the size is in pixels."""
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=3)]),
            string_val=[str(width).encode(), str(height).encode(), png],
        )
        metadata = image_metadata.create_summary_metadata(display_name=None, description=None)
        value = summary_pb2.Summary.Value(tag=name, metadata=metadata, tensor=tensor)
        self._append_summary(step, summary_pb2.Summary(value=[value]))

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Writes the settings for TensorBoard's HParams tab; nested dicts become dotted names."""
        flat = _flatten(values)
        self._append_summary(0, hparams_pb(flat))

    def finished(self, step: int) -> None:
        """Marks the run as successful in TensorBoard's HParams tab."""
        info = plugin_data_pb2.SessionEndInfo(status=1, end_time_secs=time.time())  # STATUS_SUCCESS in api.proto
        data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
        value = summary_pb2.Summary.Value(
            tag=hparams_metadata.SESSION_END_INFO_TAG,
            metadata=hparams_metadata.create_summary_metadata(data),
            tensor=hparams_metadata.NULL_TENSOR,
        )
        self._append_summary(step, summary_pb2.Summary(value=[value]))

    def conversations(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows to conversations/NAME.jsonl; numbers that are not finite are null."""
        for row in rows:
            self._append(f'{CONVERSATIONS_FOLDER}/{name}.jsonl', _json_line(row))

    def offsets(self) -> dict[str, int]:
        """Flushes and syncs all files; their sizes in bytes, as written."""
        for name, file in self._files.items():
            with named_errors(self._folder / name):
                file.flush()
                os.fsync(file.fileno())
        return {name: (self._folder / name).stat().st_size for name in self._existing()} | self._sizes

    def truncate(self, offsets: Mapping[str, int], first_step: int) -> None:
        """Truncates every file to its offset and deletes files without one.

        Prints a line for each conversations or TensorBoard file that has lost what the checkpoint knows of.

        Args:
            offsets: of the checkpoint that the run resumes from; empty: it starts anew.
            first_step: the first step that is logged from now on.

        Raises:
            WorkdirError: metrics.jsonl, of which results are made, has lost lines. Nothing was truncated.
        """
        if not self._writes:
            return
        self.close()
        sizes = {name: (self._folder / name).stat().st_size for name in self._existing()}
        for name, offset in offsets.items():
            size = sizes.get(name, 0)
            if name == METRICS_FILE and not _is_whole(self._folder / name, offset):
                raise WorkdirError(
                    f'{self._folder / name}: expected the {offset} bytes of the checkpoint, found {size} or other '
                    f'lines: it was changed, and results need it. Restore it, or delete {self._folder} to start anew'
                )
            if size < offset:
                lost = f'expected the {offset} bytes of the checkpoint, found {size}; the rest is lost'
                print(f'{self._folder / name}: {lost}', flush=True)
        self.truncate_events(offsets, first_step)
        for name, size in sizes.items():
            if name in offsets:
                os.truncate(self._folder / name, min(size, offsets[name]))
            elif not name.startswith(TENSORBOARD_FOLDER):
                (self._folder / name).unlink()

    def truncate_events(self, offsets: Mapping[str, int], first_step: int) -> None:
        """Does the same for TensorBoard's files only. Files without an offset stay, empty: no name is used twice."""
        if not self._writes:
            return
        existing = [name for name in self._existing() if name.startswith(TENSORBOARD_FOLDER)]
        for name in existing:
            path = self._folder / name
            os.truncate(path, min(path.stat().st_size, offsets.get(name, 0)))
        self._first_step = first_step
        self._events_file = self._new_events_file([*existing, *offsets])

    def close(self) -> None:
        files, self._files, self._sizes = self._files, {}, {}
        for name, file in files.items():
            with named_errors(self._folder / name):
                file.close()

    def _existing(self) -> list[str]:
        """Paths of the files that exist, relative to the folder."""
        events = [f'{TENSORBOARD_FOLDER}/{EVENTS_NAME}{number}' for number in ('', '.[0-9][0-9][0-9][0-9]')]
        patterns = (METRICS_FILE, *events, f'{CONVERSATIONS_FOLDER}/*.jsonl')
        found = [path for pattern in patterns for path in sorted(self._folder.glob(pattern))]
        return [path.relative_to(self._folder).as_posix() for path in found]

    def _new_events_file(self, names: Iterable[str]) -> str:
        """The TensorBoard file after those of these names."""
        numbers = [name.rpartition('.')[2] for name in names if name.startswith(f'{TENSORBOARD_FOLDER}/{EVENTS_NAME}.')]
        return f'{TENSORBOARD_FOLDER}/{EVENTS_NAME}.{max(map(int, numbers), default=-1) + 1:04d}'

    def _append(self, name: str, data: bytes) -> None:
        if not self._writes:
            return
        path = self._folder / name
        with named_errors(path):
            if name not in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[name] = open(path, 'ab')  # noqa: SIM115  (closed by `close`)
                self._sizes[name] = self._files[name].tell()
            self._sizes[name] += self._files[name].write(data)
            self._files[name].flush()  # readers and kills see whole lines

    def _append_summary(self, step: int, summary: summary_pb2.Summary) -> None:
        now = time.time()
        records = [event_pb2.Event(wall_time=now, step=step, summary=summary)]
        if self._events_file not in self._files:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            records = [
                event_pb2.Event(wall_time=now, file_version='brain.Event:2'),
                event_pb2.Event(wall_time=now, step=self._first_step, session_log=start),
                *records,
            ]
        self._append(self._events_file, b''.join(map(_record, records)))


class _Buffer:
    """The file object that `RecordWriter` writes to."""

    def __init__(self) -> None:
        self.data = b''

    def write(self, data: bytes) -> None:
        self.data += data


def _record(event: event_pb2.Event) -> bytes:
    buffer = _Buffer()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.data


def _is_whole(path: pathlib.Path, size: int) -> bool:
    """True if so many bytes of a file exist and end a line."""
    if not size:
        return True
    if not path.exists():
        return False
    with open(path, 'rb') as file:
        file.seek(size - 1)
        return file.read(1) == b'\n'


def _json_line(row: Mapping[str, Any]) -> bytes:
    # Decoded samples may contain lone surrogates; ASCII escapes make them valid JSON and UTF-8.
    return (json.dumps(_plain(row), allow_nan=False) + '\n').encode()


def _plain(value: Any) -> Any:
    """A value for JSON: numpy becomes Python, non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten(values: Mapping[str, Any], prefix: str = '') -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f'{prefix}{name}.')
        else:
            flat[f'{prefix}{name}'] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
