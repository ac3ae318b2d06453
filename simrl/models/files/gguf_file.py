"""Reads the metadata of a GGUF file, or of all its shards, and maps its tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file has a header, keys and values, a table of
tensors, and their data; a model may be split over several. Reading is strict: every size is checked against the file's,
every name occurs once.

Only constants come from the gguf package. Its GGUFReader reads a truncated string as a shorter one, does not name a
truncated tensor, and takes seconds for the hundred thousand strings of a vocabulary.
"""

import dataclasses
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a mapped file."""

    shape: tuple[int, ...]  # in numpy's order: the last axis is contiguous
    type: GGMLQuantizationType
    data: np.ndarray  # view of the mapped file, uint8 `[..., bytes of a row]`


_SCALAR_FORMATS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING_TYPE, _ARRAY_TYPE = 8, 9


class _Cursor:
    """Reads a file from front to back. `what` names the current item in errors."""

    def __init__(self, path: str | Path) -> None:
        with open(path, 'rb') as file:
            self.buffer = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.path, self.offset, self.what = path, 0, 'header'

    def take(self, num_bytes: int) -> memoryview:
        end = self.offset + num_bytes
        if end > len(self.buffer):
            raise ValueError(
                f'{self.path}: {self.what}: expected {num_bytes} bytes at byte {self.offset}, found the file to end '
                f'at {len(self.buffer)}: truncated or damaged'
            )
        taken, self.offset = self.buffer[self.offset : end], end
        return taken

    def unpack(self, letters: str) -> tuple[Any, ...]:
        return struct.unpack('<' + letters, self.take(struct.calcsize('<' + letters)))

    def number(self, letter: str) -> Any:
        return self.unpack(letter)[0]

    def string(self) -> str:
        raw = bytes(self.take(self.number('Q')))
        try:
            return raw.decode('utf-8')
        except UnicodeDecodeError as error:
            raise ValueError(f'{self.path}: {self.what}: expected UTF-8 text, found {raw[:40]!r}') from error

    def value(self, kind: int) -> Any:
        if kind == _STRING_TYPE:
            return self.string()
        if kind == _ARRAY_TYPE:
            item_kind, count = self.unpack('IQ')
            if item_kind not in _SCALAR_FORMATS:
                return [self.value(item_kind) for _ in range(count)]
            letter = _SCALAR_FORMATS[item_kind]
            raw = self.take(count * struct.calcsize('<' + letter))
            return [item for (item,) in struct.iter_unpack('<' + letter, raw)]
        if kind not in _SCALAR_FORMATS:
            raise ValueError(f'{self.path}: {self.what}: expected a GGUF value type (0 to 12), found {kind}')
        value = self.number(_SCALAR_FORMATS[kind])
        # The shortest decimal number for this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == 6 else value


_SHARD_NAME = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')


def shard_paths(path: str | Path) -> list[Path]:
    """Names of all shards of a model by the name of one, as llama.cpp writes them; of a single file, its own."""
    path = Path(path)
    if (parts := _SHARD_NAME.fullmatch(path.name)) is None:
        return [path]
    count = int(parts[3])
    return [path.with_name(f'{parts[1]}-{number:05}-of-{count:05}.gguf') for number in range(1, count + 1)]


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads metadata and tensors, by name, of a GGUF file or, given one of its shards, of the whole model.

    The metadata are those of the first shard; the others have none of the model's.

    Raises:
        FileNotFoundError: no such file, or another shard is missing.
        ValueError: a damaged file, or shards that do not fit together.
    """
    metadata, tensors = _read_file(path)
    if metadata.get('split.count', 1) == 1:
        return metadata, tensors
    number, count = metadata.get('split.no'), metadata['split.count']
    paths = shard_paths(path)
    if len(paths) != count or Path(path) not in paths or paths.index(Path(path)) != number:
        raise ValueError(
            f'{path}: shard {number} of {count} (split.no, split.count; from 0): expected a name that ends with the '
            'number from 1 and the count, as in -00001-of-00002.gguf, by which the other shards are found'
        )
    shards = {}
    for i, shard in enumerate(paths):
        if not shard.is_file():
            raise FileNotFoundError(f'{shard}: expected shard {i + 1} of {count} beside {Path(path).name}, found none')
        shards[shard] = found, own = (metadata, tensors) if i == number else _read_file(shard)
        if (found.get('split.no'), found.get('split.count')) != (i, count):
            raise ValueError(
                f'{shard}: split.no, split.count: expected {i} of {count}, found {found.get("split.no")} of '
                f'{found.get("split.count")}'
            )
    whole: dict[str, Tensor] = {}
    for shard, (_, own) in shards.items():
        if twice := sorted(whole.keys() & own):
            raise ValueError(f'{shard}: tensor {twice[0]}: expected each tensor in one shard, found it in two')
        whole |= own
    metadata = shards[paths[0]][0]
    if metadata.get('split.tensors.count', len(whole)) != len(whole):
        raise ValueError(
            f'{paths[0]}: split.tensors.count: expected the {len(whole)} tensors of all shards, '
            f'found {metadata["split.tensors.count"]}'
        )
    return metadata, whole


def _read_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads metadata and tensors of one file (version 2 or 3, little-endian)."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: expected a GGUF file, found none')
    if Path(path).stat().st_size == 0:
        raise ValueError(f'{path}: expected a GGUF file, found an empty one')
    cursor = _Cursor(path)
    magic = bytes(cursor.take(4))
    if magic != b'GGUF':
        raise ValueError(f"{path}: expected a GGUF file (its first bytes are b'GGUF'), found {magic!r}")
    version, num_tensors, num_keys = cursor.unpack('IQQ')
    if version not in (2, 3):
        raise ValueError(f'{path}: expected GGUF version 2 or 3, little-endian, found {version}')

    metadata: dict[str, Any] = {}
    for i in range(num_keys):
        cursor.what = f'metadata key {i} of {num_keys}'
        cursor.what = key = cursor.string()
        if key in metadata:
            raise ValueError(f'{path}: {key}: expected each metadata key once, found it twice')
        metadata[key] = cursor.value(cursor.number('I'))

    table: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for i in range(num_tensors):
        cursor.what = f'tensor {i} of {num_tensors}'
        name = cursor.string()
        cursor.what = f'tensor {name}'
        if name in table:
            raise ValueError(f'{path}: {cursor.what}: expected each tensor once, found it twice')
        num_axes = cursor.number('I')
        if not 1 <= num_axes <= 4:
            raise ValueError(f'{path}: {cursor.what}: expected 1 to 4 axes, found {num_axes}')
        shape = tuple(reversed(cursor.unpack(f'{num_axes}Q')))  # the file counts the axes from the fastest
        kind, offset = cursor.unpack('IQ')
        try:
            table[name] = shape, GGMLQuantizationType(kind), offset
        except ValueError as error:
            raise ValueError(f'{path}: {cursor.what}: expected a known tensor type, found number {kind}') from error

    alignment = metadata.get('general.alignment', 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f'{path}: general.alignment: expected a positive number of bytes, found {alignment!r}')
    start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in table.items():
        cursor.what, cursor.offset = f'tensor {name}', start + offset
        block_items, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_items:
            raise ValueError(
                f'{path}: tensor {name}: expected rows of a multiple of {block_items} ({kind.name}), found {shape[-1]}'
            )
        row_bytes = shape[-1] // block_items * block_bytes
        data = np.frombuffer(cursor.take(math.prod(shape[:-1]) * row_bytes), np.uint8)
        tensors[name] = Tensor(shape=shape, type=kind, data=data.reshape(*shape[:-1], row_bytes))
    return metadata, tensors
