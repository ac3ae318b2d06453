"""Rows that leave the batch when they have ended: the same conversations, in few sizes, and nothing of the caller's."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.chat import ASSISTANT, USER
from simrl.models.cache import Cache
from simrl.rollouts.compaction import ActiveBatch, all_active, batch_sizes, compact, restore
from simrl.rollouts.dialogue import add_message
from simrl.rollouts.state import Dialogue, EndReason
from simrl.rollouts.trajectories import rollout_metrics
from tests.rollouts import scene

ROWS = [row for row in range(8) for _ in range(5)]  # of the scene; no power of two
CONTENT_WITHOUT_STOPS = [token for token in scene.CONTENT if token % 2 and token not in scene.TRIPLE_STOP]


@pytest.fixture(scope='module', autouse=True)
def compiled_before() -> int:
    """How many programs of `add_message` there were before the first of these tests."""
    return add_message._cache_size()


# Without models.


@settings(max_examples=6, deadline=None)
@given(
    rows=st.sampled_from([7, 25, 40]),
    ends=st.lists(st.integers(0, 6), min_size=40, max_size=40),
    lasts=st.booleans(),
)
def test_every_row_is_worked_on_as_long_as_it_runs(rows: int, ends: Sequence[int], lasts: bool) -> None:
    """Rows that count their own rounds, in their records and their caches, until each has ended."""
    ends_at = np.array(ends[:rows])
    if lasts:
        ends_at[-1] = 7
    counts, cache = jnp.zeros((rows, 3), jnp.int32), jnp.zeros((rows, 2, 4, 4))
    batch = all_active({'count': counts, 'cache': Cache((cache,), (cache + 10,))}, jnp.arange(rows), rows)
    for number in range(8):
        running = number < ends_at[batch.rows]
        if not running.any():
            break
        batch = compact(batch, running)
        size = len(batch.rows)
        assert size == min(size for size in batch_sizes(rows, 1) if size >= running.sum())
        assert np.array_equal(batch.inputs, batch.rows)
        assert len(set(batch.rows.tolist())) == size
        still = jnp.asarray(number < ends_at[batch.rows])
        before = batch.active['cache']
        np.testing.assert_array_equal(before.key[0][still], number)
        more = still[:, None, None, None]
        active = {
            'count': batch.active['count'] + still[:, None],
            'cache': Cache((before.key[0] + more,), (before.value[0] + more,)),
        }
        batch = ActiveBatch(active, batch.inputs, batch.index, rows, batch.stored)
    out = restore(batch)
    assert out['cache'] is None
    np.testing.assert_array_equal(out['count'], np.repeat(ends_at[:, None], 3, axis=1))


def test_sizes_are_few_and_not_small() -> None:
    assert batch_sizes(256, 1) == [256, 128, 64]
    assert batch_sizes(40, 1) == [40, 20, 10]
    assert batch_sizes(25, 1) == [25, 13]
    assert batch_sizes(12, 1) == [12]
    assert batch_sizes(256, 8) == [32, 16, 8]  # of each of eight devices
    assert batch_sizes(40, 8) == [5, 3, 2]
    assert batch_sizes(8, 4) == [2]


# Whole conversations.


def _start() -> tuple[Dialogue, jax.Array]:
    """Forty conversations of the scene's prompts, all with keys of their own."""
    return scene.start(ROWS), scene.keys(range(100, 100 + len(ROWS)))


def _failing(dialogue: Dialogue, rows: np.ndarray) -> Dialogue:
    """The same start where these rows have failed."""
    empty = np.isin(np.arange(len(ROWS)), rows)
    reason = jnp.where(empty, jnp.int8(EndReason.FAILURE), dialogue.end_reason)
    return dialogue.replace(end_reason=reason)  # type: ignore[attr-defined]


def _allowed(user: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    mask = np.zeros_like(scene.TOKEN_MASKS[0])
    mask[list(user)] = True
    return jnp.asarray(mask), jnp.asarray(scene.TOKEN_MASKS[1])


CASES = {
    'as they are': (_allowed(np.flatnonzero(scene.TOKEN_MASKS[0])), ()),
    'some fail at once': (_allowed(np.flatnonzero(scene.TOKEN_MASKS[0])), range(0, 24)),
    'all end with their first word': (_allowed([scene.TERMINAL]), ()),
    'none ends': (_allowed([*CONTENT_WITHOUT_STOPS, scene.EOT_ASSISTANT]), ()),
    'none begins': (_allowed(np.flatnonzero(scene.TOKEN_MASKS[0])), range(len(ROWS))),
}


@functools.cache
def _both(case: str) -> tuple[Dialogue, Dialogue]:
    """The conversations of a case by `converse`, and message by message with all rows in the batch; on the host."""
    token_mask, failing = CASES[case]
    policies = [
        dataclasses.replace(policy, token_mask=mask) for policy, mask in zip(scene.policies(), token_mask, strict=True)
    ]
    dialogue, keys = _start()
    out = scene.converse(*policies, _failing(dialogue, np.array(failing)), keys, turns=scene.TURNS)
    dialogue, keys = _start()
    whole = _failing(dialogue, np.array(failing))
    for number in range(2 * scene.TURNS):
        whole = add_message(*policies, whole, keys, role=(USER, ASSISTANT)[number % 2])
    return jax.device_get(out), scene.without_caches(whole)


@pytest.mark.parametrize('case', list(CASES))
def test_no_field_depends_on_which_rows_are_active(case: str) -> None:
    """But the steps of the loops while a row was in the batch, which are fewer."""
    out, whole = _both(case)
    found, expected = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (out, whole))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        name = jax.tree_util.keystr(path)
        if name.endswith('log_prob'):
            np.testing.assert_allclose(array, expected[path], atol=2e-5, err_msg=name)
        elif name == '.loop_steps':
            assert np.all(array <= expected[path])
            assert np.all(array >= out.decoded_steps)
        else:
            np.testing.assert_array_equal(array, expected[path], err_msg=name)


def test_the_cases_are_what_they_are_called() -> None:
    ends = {case: _both(case)[0] for case in CASES}
    running = [(ends['as they are'].num_messages > number).sum() for number in range(2 * scene.TURNS)]
    assert len({min(size for size in batch_sizes(40, 1) if size >= count) for count in running}) > 1
    assert {EndReason.SIGNAL, EndReason.TURNS} == set(ends['as they are'].end_reason.tolist())
    assert (ends['some fail at once'].end_reason == EndReason.FAILURE).sum() == 24
    assert set(ends['all end with their first word'].end_reason.tolist()) == {EndReason.SIGNAL}
    assert set(ends['none ends'].end_reason.tolist()) == {EndReason.TURNS}
    assert np.all(ends['none begins'].loop_steps == 0)


def test_more_of_the_decoding_is_useful() -> None:
    for case, better in (('as they are', True), ('some fail at once', True), ('none ends', False)):
        useful, of_all = ([float(x) for x in rollout_metrics(x)['rollout/useful_steps']] for x in _both(case))
        assert useful[0] == of_all[0]
        assert (useful[1] < of_all[1]) == better


def test_compiles_once_for_each_role_and_size(compiled_before: int) -> None:
    for case in CASES:
        _both(case)
    assert add_message._cache_size() - compiled_before == 2 * len(batch_sizes(len(ROWS), 1))
