"""Batches: every row once an epoch, and a batch is a function of its step."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.batches import Batches, BatchSettings, stack, stack_preferences
from simrl.conversations.chat import PAD, USER
from simrl.conversations.views import PreferenceRow, Rendered

LENGTHS = (4, 7, 16)


def row(length, fill=1):
    full = np.full(length, fill)
    return Rendered(full.astype(np.int32), np.full(length, USER, np.int8), full.astype(np.int16), full > 0)


def numbers(rows, length, num_rows, index):
    """The row numbers and lengths of a batch, without its arrays."""
    return types.SimpleNamespace(length=length, num_rows=num_rows, index=list(index))


@st.composite
def data(draw):
    rows = [row(length) for length in draw(st.lists(st.integers(1, LENGTHS[-1]), min_size=1, max_size=40))]
    return rows, BatchSettings(draw(st.integers(1, 15)), LENGTHS, draw(st.integers(0, 2**32)))


@settings(max_examples=60, deadline=None)
@given(data=data(), epoch=st.integers(0, 3))
def test_every_row_is_met_once_an_epoch_in_the_smallest_bucket_that_holds_it(data, epoch):
    rows, batch_settings = data
    batches = Batches(rows, batch_settings, numbers)
    met = []
    for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
        batch = batches.batch(step)
        assert batch.num_rows == batch_settings.batch_size
        assert 0 < len(batch.index) <= batch.num_rows  # no batch of padding alone
        for i in batch.index:
            assert batch.length == min(length for length in LENGTHS if length >= len(rows[i]))
        met += batch.index
    assert sorted(met) == list(range(len(rows)))


@settings(max_examples=30, deadline=None)
@given(data=data(), steps=st.lists(st.integers(0, 100), min_size=1, max_size=10))
def test_a_batch_is_a_function_of_its_step(data, steps):
    rows, batch_settings = data
    used = Batches(rows, batch_settings, numbers)
    for step in steps:
        assert used.batch(step) == Batches(rows, batch_settings, numbers).batch(step)


def test_epochs_and_seeds_differ():
    rows = [row(3) for _ in range(64)]
    orders = []
    for seed in (0, 1):
        batches = Batches(rows, BatchSettings(16, LENGTHS, seed), numbers)
        orders += [tuple(i for step in range(4) for i in batches.batch(4 * epoch + step).index) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(64))}


def test_buckets_are_mixed_within_an_epoch():
    rows = [row(length) for length in (3, 16) for _ in range(40)]
    batches = Batches(rows, BatchSettings(4, LENGTHS), numbers)
    lengths = [batches.batch(step).length for step in range(len(batches))]
    assert len(batches) == batches.batches_per_epoch == 20
    assert lengths != sorted(lengths)


def test_arrays_of_a_batch():
    rows = [row(3, fill=7), row(1, fill=8), row(5, fill=9)]
    batches = Batches(rows, BatchSettings(2, LENGTHS, seed=3), stack)
    found = {}
    for step in range(2):
        batch = batches.batch(step)
        assert [getattr(batch, name).dtype for name in ('tokens', 'role', 'message', 'trained', 'length', 'index')] == [
            'int32',
            'int8',
            'int16',
            'bool',
            'int32',
            'int32',
        ]
        for i, number in enumerate(batch.index):
            length = batch.length[i]
            assert (number == -1) == (length == 0)
            assert (batch.tokens[i, length:] == 0).all()
            assert (batch.role[i, length:] == PAD).all()
            assert (batch.message[i, length:] == -1).all()
            assert not batch.trained[i, length:].any()
            assert batch.trained[i, :length].all()
            assert (batch.role[i, :length] == USER).all()
            found[int(number)] = (batch.tokens.shape, batch.tokens[i, :length].tolist())
    assert found == {0: ((2, 4), [7, 7, 7]), 1: ((2, 4), [8]), 2: ((2, 7), [9] * 5), -1: ((2, 7), [])}


def test_pairs_stay_together():
    rows = [PreferenceRow(row(2, fill=10 + i), row(3 + i, fill=20 + i)) for i in range(3)]
    batches = Batches(rows, BatchSettings(2, LENGTHS), stack_preferences)
    met = []
    for step in range(len(batches)):
        batch = batches.batch(step)
        assert batch.tokens.shape[0] == 4
        assert batch.index[0::2].tolist() == batch.index[1::2].tolist()
        for pair in range(2):
            number = int(batch.index[2 * pair])
            if number >= 0:
                assert batch.tokens[2 * pair : 2 * pair + 2, 0].tolist() == [10 + number, 20 + number]
                assert batch.length[2 * pair : 2 * pair + 2].tolist() == [2, 3 + number]
                met.append(number)
            else:
                assert batch.length[2 * pair : 2 * pair + 2].tolist() == [0, 0]
    assert sorted(met) == [0, 1, 2]


@pytest.mark.parametrize(
    ('error', 'make'),
    [
        (r'batch_size: expected at least 1, found 0', lambda: BatchSettings(0, LENGTHS)),
        (r'lengths: expected ascending', lambda: BatchSettings(1, (4, 4))),
        (r'lengths: expected ascending', lambda: BatchSettings(1, ())),
        (r'at least one row, found none', lambda: Batches([], BatchSettings(1, LENGTHS), stack)),
        (
            r'row 1: expected 1 to 16 tokens \(BatchSettings.lengths\), found 17',
            lambda: Batches([row(1), row(17)], BatchSettings(1, LENGTHS), stack),
        ),
        (r'row 1: expected 1 to 16 .* found 0', lambda: Batches([row(1), row(0)], BatchSettings(1, LENGTHS), stack)),
        (r'step: expected at least 0, found -1', lambda: Batches([row(1)], BatchSettings(1, LENGTHS), stack).batch(-1)),
        (r'row 5: expected at most 2 tokens, found 3', lambda: stack([row(3)], 2, 1, [5])),
        (r'expected at most 1 rows, found 2', lambda: stack([row(1), row(1)], 2, 1)),
    ],
)
def test_impossible_batches(error, make):
    with pytest.raises(ValueError, match=error):
        make()
