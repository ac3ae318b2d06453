"""First user messages of many conversations: keys of equal ones, and frequent n-grams.

N-grams are of lower-cased words between white space. They are counted exactly on disk: their 64-bit hashes are written
into BUCKETS files by their first bits, and one file at a time is sorted, so that memory does not grow with the data.
"""

import functools
import pathlib

import numpy as np

from simrl.conversations.splits import hash64
from simrl.run.stage_files import named_errors

BUCKETS = 64  # a power of two
BUFFER = 2**20  # n-grams that are in memory before they are written
PAIR = np.dtype([('ngram', '<u8'), ('row', '<u4')])  # an n-gram and a row whose opening has it


def opening_key(text: str) -> int:
    """Hash of a first message, equal for texts that differ in case and white space only."""
    return hash64(' '.join(text.lower().split()))


_word_hash = functools.lru_cache(maxsize=2**17)(hash64)


def ngram_hashes(text: str, size: int) -> np.ndarray:
    """Hashes of the different n-grams of a text.

    Returns:
        uint64 [N], sorted: sums of the words' hashes, each times an odd number of its place, modulo 2^64.
    """
    words = np.array([_word_hash(word) for word in text.lower().split()], np.uint64)
    num = len(words) - size + 1
    if num < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(num, np.uint64)
    for place in range(size):
        total += words[place : place + num] * np.uint64(hash64(f'place {place}') | 1)
    return np.unique(total)


class NgramFiles:
    """N-grams of openings in files of a folder, by their first bits."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(exist_ok=True)
        self._paths = [folder / f'ngrams-{bucket:02d}' for bucket in range(BUCKETS)]
        for path in self._paths:
            path.write_bytes(b'')
        self._pairs: list[np.ndarray] = []
        self._buffered = 0

    def add(self, row: int, ngrams: np.ndarray) -> None:
        pairs = np.empty(len(ngrams), PAIR)
        pairs['ngram'], pairs['row'] = ngrams, row
        self._pairs.append(pairs)
        self._buffered += len(pairs)
        if self._buffered >= BUFFER:
            self._write()

    def _write(self) -> None:
        pairs = np.concatenate([np.empty(0, PAIR), *self._pairs])
        pairs = pairs[np.argsort(pairs['ngram'])]
        bits = np.uint64(64 - BUCKETS.bit_length() + 1)
        ends = np.searchsorted(pairs['ngram'] >> bits, np.arange(BUCKETS, dtype=np.uint64), 'right')
        for path, some in zip(self._paths, np.split(pairs, ends[:-1]), strict=True):
            with named_errors(path), path.open('ab') as file:
                file.write(some.tobytes())
        self._pairs, self._buffered = [], 0

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
            _, inverse, counts = np.unique(pairs['ngram'], return_inverse=True, return_counts=True)
            found[pairs['row'][counts[inverse] > limit]] = True
        return found
