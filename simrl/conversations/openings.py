"""First user messages of many conversations: keys of equal ones, and frequent n-grams.

N-grams are of lower-cased words between white space. They are counted exactly on disk: their 64-bit hashes are written
into BUCKETS files by their first bits, and one file at a time is sorted, so that memory does not grow with the data.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from simrl.conversations.splits import hash64
from simrl.run.stage_files import named_errors

BUCKETS = 64  # a power of two
BUFFER = 2**22  # characters of openings that are in memory before their n-grams are written
PAIR = np.dtype([('ngram', '<u8'), ('row', '<u4')])  # an n-gram and a row whose opening has it


def opening_key(text: str) -> int:
    """Hash of a first message, equal for texts that differ in case and white space only."""
    return hash64(' '.join(text.lower().split()))


_word_hash = functools.lru_cache(maxsize=2**17)(hash64)


def ngram_pairs(openings: Sequence[tuple[int, str]], size: int) -> np.ndarray:
    """Hashes the n-grams of texts.

    Args:
        openings: rows and their texts.
        size: words of an n-gram.

    Returns:
        PAIR [N], an n-gram of a text as often as the text has it. Its hash is the sum of the words' hashes, each times
        an odd number that depends on its place, modulo 2^64.
    """
    texts = [text.lower().split() for _, text in openings]
    row = np.repeat(np.array([row for row, _ in openings], np.uint32), [len(words) for words in texts])
    words = np.fromiter(map(_word_hash, itertools.chain.from_iterable(texts)), np.uint64, len(row))
    num = max(len(row) - size + 1, 0)
    ngram = np.zeros(num, np.uint64)
    for place in range(size):
        ngram += words[place : place + num] * np.uint64(hash64(f'place {place}') | 1)
    pairs = np.empty(num, PAIR)
    pairs['ngram'], pairs['row'] = ngram, row[:num]
    return pairs[row[:num] == row[size - 1 :][:num]]  # not those over the end of a text


class NgramFiles:
    """N-grams of openings in files of a folder, by their first bits.

    Args:
        size: words of an n-gram.
        lengths: `kept_lengths` of an earlier process; what it wrote later is deleted. None: everything is.

    Raises:
        ValueError: a file is shorter than that.
    """

    def __init__(self, folder: pathlib.Path, size: int, lengths: Sequence[int] | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self._size = size
        self._paths = [folder / f'ngrams-{bucket:02d}' for bucket in range(BUCKETS)]
        for path, length in zip(self._paths, lengths or [0] * BUCKETS, strict=True):
            with named_errors(path), path.open('ab') as file:
                if file.tell() < length:
                    raise ValueError(
                        f'{path}: expected {length} bytes of a killed preparation, found {file.tell()}; delete '
                        f'{folder} and it begins anew'
                    )
                file.truncate(length)
        self._openings: list[tuple[int, str]] = []
        self._buffered = 0

    def add(self, row: int, opening: str) -> None:
        """Adds the opening of a row; rows are added once."""
        self._openings.append((row, opening))
        self._buffered += len(opening)
        if self._buffered >= BUFFER:
            self._write()

    def kept_lengths(self) -> list[int]:
        """Writes what is in memory to the disk; returns the length of each file, from which it can be opened again."""
        self._write()
        lengths = []
        for path in self._paths:
            with named_errors(path), path.open('ab') as file:
                os.fsync(file.fileno())
                lengths.append(file.tell())
        return lengths

    def _write(self) -> None:
        pairs = ngram_pairs(self._openings, self._size)
        pairs = pairs[np.argsort(pairs['ngram'])]
        bits = np.uint64(64 - BUCKETS.bit_length() + 1)
        ends = np.searchsorted(pairs['ngram'] >> bits, np.arange(BUCKETS, dtype=np.uint64), 'right')
        for path, some in zip(self._paths, np.split(pairs, ends[:-1]), strict=True):
            with named_errors(path), path.open('ab') as file:
                file.write(some.tobytes())
        self._openings, self._buffered = [], 0

    def frequent_rows(self, counted: np.ndarray, limit: int) -> np.ndarray:
        """Finds rows whose opening has an n-gram that more than `limit` openings have.

        Args:
            counted: bool [rows], the rows whose openings count.

        Returns:
            bool [rows], true for counted rows only.
        """
        self._write()
        found = np.zeros(len(counted), bool)
        for path in self._paths:
            pairs = np.fromfile(path, PAIR)
            pairs = pairs[counted[pairs['row']]]
            pairs = pairs[np.lexsort((pairs['row'], pairs['ngram']))]
            repeated = np.zeros(len(pairs), bool)  # an opening counts once
            repeated[1:] = pairs[1:] == pairs[:-1]
            pairs = pairs[~repeated]
            _, inverse, counts = np.unique(pairs['ngram'], return_inverse=True, return_counts=True)
            found[pairs['row'][counts[inverse] > limit]] = True
        return found
