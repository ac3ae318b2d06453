"""Openings: n-grams counted on disk are those of a slow loop, and equal texts have equal keys."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations import openings
from simrl.conversations.openings import NgramFiles, ngram_pairs, opening_key

TEXTS = st.lists(st.lists(st.sampled_from('aAbc'), max_size=9).map(' '.join), max_size=12)


def slow_ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@settings(deadline=None)
@given(TEXTS, st.integers(1, 4), st.integers(0, 4), st.data())
def test_frequent_rows_are_those_of_a_slow_loop(tmp_path_factory, texts, size, limit, data):
    counted = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    files = NgramFiles(tmp_path_factory.mktemp('ngrams'), size)
    for row, text in enumerate(texts):
        files.add(row, text)
    ngrams = [slow_ngrams(text, size) for text in texts]
    counts = collections.Counter(x for row, found in enumerate(ngrams) if counted[row] for x in found)
    expected = [counted[row] and any(counts[x] > limit for x in found) for row, found in enumerate(ngrams)]
    assert files.frequent_rows(np.array(counted, bool), limit).tolist() == expected


def test_a_full_buffer_is_written_and_an_old_file_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(openings, 'BUFFER', 100)
    for _ in range(2):  # the second time over the files of the first
        files = NgramFiles(tmp_path / 'ngrams', 2)
        for row in range(100):
            files.add(row, f'{row} shared words {row}')
        assert files.frequent_rows(np.ones(100, bool), 99).all()
        assert not files.frequent_rows(np.ones(100, bool), 100).any()
    sizes = [path.stat().st_size for path in (tmp_path / 'ngrams').iterdir()]
    assert len(sizes) == openings.BUCKETS
    assert sum(sizes) == 300 * openings.PAIR.itemsize
    assert sum(size > 0 for size in sizes) > 40  # spread over the files


@pytest.mark.parametrize(('one', 'other'), [('a b', 'b a'), ('a a b', 'a b b'), ('ab c', 'a bc')])
def test_the_order_of_words_matters(one, other):
    assert ngram_pairs([(0, one)], 2).tolist() != ngram_pairs([(0, other)], 2).tolist()


def test_keys_ignore_case_and_white_space():
    assert opening_key(' Write\n a  HAIKU ') == opening_key('write a haiku')
    assert opening_key('write a haiku') != opening_key('write a haikus')
