"""Rows of a published data set, from the Hugging Face hub or from local files of the same schema.

Local files are `.parquet`, `.jsonl` and `.jsonl.gz`, or a folder of them. A hub data set is streamed, never downloaded
whole, at one commit. Either way the inputs have content hashes. Times are read in whatever unit.
"""

import dataclasses
import datetime
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow

from simrl.conversations.manifest import describe
from simrl.conversations.row_files import SUFFIXES, RowError, batch_rows, placed_rows
from simrl.run.config import local_path
from simrl.run.stage_files import is_foreign

BATCH_ROWS = 1000  # rows of a streamed Parquet file that are in memory at once
BROKEN = (OSError, pyarrow.ArrowException, ValueError, OverflowError)  # errors of a stream; a time past Python's
Rows = Iterator[Mapping[str, Any]]
YEARS = (2000, 2100)  # a time outside of them was read in a wrong unit
UNITS = ((1e11, 1), (1e14, 1e3), (1e17, 1e6), (np.inf, 1e9))  # numbers below the first have the second a second


@dataclasses.dataclass(frozen=True)
class HubParts:
    """The parts of a hub data set that are read."""

    splits: tuple[str, ...] = ('train',)
    config: str | None = None
    folder: str | None = None


@dataclasses.dataclass(frozen=True)
class RawData:
    """A data set as its publisher wrote it.

    Attributes:
        inputs: size and sha256 of every file by its name; of a hub data set also the commit.
        parts: returns the functions that read its files, in the same order each time, as their rows are. Every row has
            the fields that were asked for.
    """

    inputs: Mapping[str, Any]
    parts: Callable[[], Sequence[Callable[[], Rows]]]

    def rows(self) -> Rows:
        """Reads it from the start."""
        for part in self.parts():
            yield from part()


def open_data(source: str, fields: Sequence[str], parts: HubParts, revision: str | None = None) -> RawData:
    """Opens a data set; rows are read later, and of Parquet files only the columns `fields`.

    Args:
        source: a local file or folder, or a hub name OWNER/NAME.
        revision: of a hub data set; None: its main branch.

    Raises:
        FileNotFoundError: there is neither such a path nor such a data set.
    """
    path = local_path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(f'revision: expected none for the local data {source}, found {revision!r}')
        files = _files(path)
        inputs = {name: describe(file) for name, file in files.items()}
        return RawData(inputs, lambda: [functools.partial(_local_rows, file, fields) for file in files.values()])
    if source.count('/') != 1 or source.startswith(('.', '/', '~')):
        raise FileNotFoundError(f'{source}: expected a file, a folder or a hub name OWNER/NAME, found none')
    return _open_hub(source, fields, parts, revision)


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    if path.is_file():
        return {path.name: path}
    files = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob('*'))
        if file.name.endswith(SUFFIXES) and file.is_file() and not is_foreign(file)
    }
    if not files:
        raise FileNotFoundError(f'{path}: expected files that end in one of {", ".join(SUFFIXES)}, found none')
    return files


def _local_rows(path: pathlib.Path, fields: Sequence[str]) -> Rows:
    for place, row in placed_rows(path, fields):
        _check_fields(row, fields, place)
        yield row


def _check_fields(row: Mapping[str, Any], fields: Sequence[str], place: str) -> None:
    if missing := [field for field in fields if field not in row]:
        raise ValueError(f'{place}: expected the fields {", ".join(missing)}, found only {", ".join(sorted(row))}')


def _open_hub(source: str, fields: Sequence[str], parts: HubParts, revision: str | None) -> RawData:
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(source, revision=revision, files_metadata=True)
    except Exception as error:  # a wrong name, no network, no access: errors of the hub and of its HTTP client
        raise FileNotFoundError(
            f'{source}: no such file or folder, and the hub gives no data set of this name: '
            f'{type(error).__name__}: {_one_line(error)}'
        ) from error
    files = {file.rfilename: file for file in info.siblings or ()}
    inputs = {
        'commit': info.sha,
        **{name: {'size': file.lfs.size, 'sha256': file.lfs.sha256} for name, file in files.items() if file.lfs},
    }
    in_parquet = any(name.endswith('.parquet') for name in files)

    def readers() -> list[Callable[[], Rows]]:
        options = {'columns': list(fields), 'batch_size': BATCH_ROWS} if in_parquet else {}
        return [
            functools.partial(_shard_rows, shard, fields, f'{source}, {split}, file {number}')
            for split in parts.splits
            for number, shard in enumerate(
                _shards(source, name=parts.config, data_dir=parts.folder, revision=info.sha, split=split, **options),
                start=1,
            )
        ]

    return RawData(inputs, readers)


def _shards(path: str, **options: Any) -> list[Any]:
    """Opens a data set as streams, one for each of its files, by `datasets.load_dataset`, whose options these are."""
    import datasets

    try:
        data = datasets.load_dataset(path, streaming=True, **options).with_format('arrow')
    except BROKEN as error:
        raise ValueError(f'{path}: the stream broke off: {_one_line(error)}') from error
    return [data.shard(num_shards=data.num_shards, index=number) for number in range(data.num_shards)]


def _shard_rows(shard: Any, fields: Sequence[str], place: str) -> Rows:
    for number, row in enumerate(_streamed(shard, place), start=1):
        _check_fields(row, fields, f'{place}, row {number}')
        yield row


def _streamed(shard: Any, place: str) -> Rows:
    try:
        for table in shard.iter(BATCH_ROWS):
            for batch in table.to_batches(BATCH_ROWS):
                yield from batch_rows(batch)
    except BROKEN as error:
        raise ValueError(f'{place}: the stream broke off: {_one_line(error)}') from error


def _one_line(error: Exception) -> str:
    """The text of an error; those of the hub and of pyarrow have several lines."""
    return ' '.join(str(error).split())


def read_time(value: Any) -> datetime.datetime:
    """Reads a datetime, an ISO text, or seconds, milli-, micro- or nanoseconds since 1970; no zone means UTC.

    Raises:
        RowError: it is none of these, or not in YEARS.
    """
    try:
        if isinstance(value, str):
            text = value.strip()
            value = float(text) if text.lstrip('-').replace('.', '', 1).isdigit() else _iso_time(text)
        if isinstance(value, int | float) and not isinstance(value, bool):
            per_second = next(unit for below, unit in UNITS if abs(value) < below)
            value = datetime.datetime.fromtimestamp(value / per_second, datetime.UTC)
        if isinstance(value, datetime.datetime):
            found = value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)
            if YEARS[0] <= found.year < YEARS[1]:
                return found
    except (ValueError, OverflowError, OSError, StopIteration):
        pass  # not a time; the error is below
    raise RowError('bad timestamp', f'expected a time of {YEARS[0]} to {YEARS[1] - 1}, found {value!r}')


def _iso_time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text.removesuffix(' UTC'))
