"""Rows and widths of microbatches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.models.rows import bucket_widths, split_by_length
from simrl.rl import microbatches
from simrl.rl.algorithm import AlgorithmSettings

WIDTHS = (8, 12, 16)
SETTINGS = AlgorithmSettings(epochs=2, minibatches=2, microbatches=3)


@given(st.lists(st.integers(0, 16), min_size=12, max_size=12), st.integers(0, 3))
def test_every_epoch_has_every_row_once_in_sorted_microbatches_of_equal_size(lengths: list[int], seed: int) -> None:
    length = np.array(lengths)
    steps = microbatches.schedule_microbatches(length, WIDTHS, SETTINGS, np.random.default_rng(seed))
    assert [len(step) for step in steps] == [3] * 4
    for epoch in (steps[:2], steps[2:]):
        assert sorted(row for step in epoch for part in step for row in part.rows) == list(range(12))
    for step in steps:
        in_order = length[np.concatenate([part.rows for part in step])]
        assert (np.diff(in_order) >= 0).all()
        for part in step:
            assert (part.rows.shape, part.rows.dtype) == ((2,), np.int32)
            longest = length[part.rows].max()
            assert part.width == min(width for width in WIDTHS if width >= longest)


def test_which_rows_meet_is_the_generators_alone() -> None:
    """Lengths decide the microbatches of a minibatch, but not its rows."""

    def rows(length: np.ndarray, seed: int) -> list[set[int]]:
        steps = microbatches.schedule_microbatches(length, WIDTHS, SETTINGS, np.random.default_rng(seed))
        return [{int(row) for part in step for row in part.rows} for step in steps]

    assert rows(np.arange(12), 0) == rows(np.arange(12)[::-1], 0)
    assert rows(np.arange(12), 0) != rows(np.arange(12), 1)


def test_widths_end_with_the_batchs_own() -> None:
    assert bucket_widths((8, 12, 16), 14) == (8, 12, 14)
    assert bucket_widths((8, 12), 12) == (8, 12)
    assert bucket_widths((8, 12), 20) == (8, 12, 20)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match='expected at most 16 tokens, found 17'):
        split_by_length(np.arange(2), np.array([3, 17]), WIDTHS, 1)
    with pytest.raises(ValueError, match='divide the 8 rows of a batch, found 2 x 3 = 6'):
        microbatches.schedule_microbatches(np.zeros(8, int), WIDTHS, SETTINGS, np.random.default_rng(0))
