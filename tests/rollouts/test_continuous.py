"""Conversations at their own pace: those of static batching, token for token, whoever takes part."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from unittest import mock

import jax
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, USER
from simrl.rollouts import compaction, context
from simrl.rollouts.agents import Agent, Resampling
from simrl.rollouts.collect import check_meshes
from simrl.rollouts.compaction import batch_sizes
from simrl.rollouts.replay import Replay
from simrl.rollouts.state import EndReason
from simrl.rollouts.trajectories import Trajectories, rollout_metrics, transcript_of
from simrl.rollouts.window import decode_block, feed_rows
from tests import many_devices
from tests.rollouts.test_host import EXAMPLES, LIMITS, ROWS, SAMPLES, agent_of, chatty, conversations_of, partner_of
from tests.rollouts.test_mixed import mixed
from tests.rollouts.test_openings import WRITER

STEPS = ('decoded_steps', 'loop_steps')


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Batches and caches of one size."""
    with monkeypatch.context() as one_size:
        one_size.setattr(compaction, 'MIN_ROWS', 2**20)
        one_size.setattr(context, 'SMALLEST_CACHE', 2**20)
        yield one_size


def agents(name: str) -> tuple[Agent, Agent, int]:
    """The user, the assistant and the view in which their conversations are compared."""
    repeating = dataclasses.replace(agent_of(USER), resampling=Resampling(tries=2, temperature_step=0.5))
    users: Mapping[str, Agent] = {
        'device': agent_of(USER),
        'host': partner_of(chatty),
        'repeating': repeating,
        'writer': WRITER,
        'mixed': mixed(),
    }
    if name == 'host assistant':
        return agent_of(USER), partner_of(chatty, LIMITS.assistant_tokens), USER
    return users.get(name, agent_of(USER)), agent_of(ASSISTANT), USER if name == 'user' else ASSISTANT


@functools.cache
def static(name: str) -> Trajectories:
    return conversations_of(*agents(name))[0]


def assert_same(found: Trajectories, expected: Trajectories, rows: np.ndarray | slice = slice(None)) -> None:
    """But for the steps: a forced end-of-turn takes none here."""
    for field in dataclasses.fields(Trajectories):
        if field.name not in STEPS:
            pair = [getattr(batch, field.name)[rows] for batch in (found, expected)]
            assert pair[0].dtype == pair[1].dtype
            if field.name == 'log_prob':
                np.testing.assert_allclose(pair[0], pair[1], atol=2e-5, rtol=0)
            else:
                np.testing.assert_array_equal(pair[0], pair[1], field.name)


@pytest.mark.parametrize(
    'name',
    [
        'device',
        'host',
        'repeating',
        *(pytest.param(name, marks=pytest.mark.long) for name in ('user', 'host assistant', 'writer', 'mixed')),
    ],
)
def test_conversations_are_those_of_static_batching(name: str) -> None:
    expected = static(name)
    whole, failures = conversations_of(*agents(name), batching='continuous')
    assert not failures
    assert_same(whole, expected)
    pieces: list[np.ndarray] = []
    found, _ = conversations_of(
        *agents(name),
        batching='continuous',
        rows_in_flight=ROWS // 3,
        on_piece=lambda piece, _: pieces.append(np.asarray(piece.messages)),
    )
    assert_same(found, expected)
    np.testing.assert_array_equal(np.concatenate(pieces), expected.messages)
    assert [len(piece) for piece in pieces] == [ROWS // 3] * 3


def test_the_scene_has_what_the_cases_are_called() -> None:
    assert static('repeating').resamples.sum() > 0
    device = static('device')
    assert {EndReason.SIGNAL, EndReason.TURNS} == set(device.end_reason.tolist())
    assert device.truncated[:, 1:].any()
    assert len(set(device.num_messages.tolist())) > 2


def test_only_the_steps_differ_and_more_of_them_are_useful() -> None:
    expected = static('device')
    found, _ = conversations_of(*agents('device'), batching='continuous')
    sampled = np.arange(expected.truncated.shape[1]) >= expected.num_given[:, None]
    forced = (expected.truncated & sampled).sum(axis=1)
    np.testing.assert_array_equal(found.decoded_steps, expected.decoded_steps - forced)
    shares = [np.divide(*jax.device_get(rollout_metrics(batch)['rollout/useful_steps'])) for batch in (expected, found)]
    assert shares[0] < shares[1]


@pytest.mark.parametrize('name', ['device', pytest.param('host', marks=pytest.mark.long)])
def test_a_record_is_continued(name: str) -> None:
    expected = static(name)
    for turns, more, sample, heard in ((1, 2, 0, 0), (2, 1, 7, 0), (1, 1, 7, 1)):
        replay = Replay(transcript_of(expected), turns, more, sample, heard)  # type: ignore[arg-type]
        pair = [conversations_of(*agents(name), batching=of, replay=replay)[0] for of in ('continuous', 'static')]
        assert_same(pair[0], pair[1])
        if not sample:
            assert_same(
                dataclasses.replace(pair[0], log_prob=expected.log_prob), expected, np.flatnonzero(replay.present)
            )


def test_padding_is_over_before_it_starts() -> None:
    expected = static('device')
    found, _ = conversations_of(*agents('device'), EXAMPLES[:4], samples=SAMPLES, padding=2, batching='continuous')
    rows = np.arange(4 * SAMPLES)
    assert_same(dataclasses.replace(found, group=expected.group), expected, rows)
    assert found.num_messages[4 * SAMPLES :].max() <= 1
    assert set(found.end_reason[4 * SAMPLES :].tolist()) == {EndReason.TURNS}


def test_a_batching_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="batching: expected 'static' or 'continuous', found 'both'"):
        conversations_of(*agents('device'), batching='both')


@pytest.mark.long
def test_devices_do_not_matter() -> None:
    """Rows stay on their devices: loops' ends are sent, what a model's parts have in common, and blocks to the host."""
    found = json.loads(many_devices.run('tests.rollouts.continuous_devices').splitlines()[-1])
    expected, _ = conversations_of(*agents('device'), samples=2 * SAMPLES)
    for mesh, on_devices in found.items():
        np.testing.assert_array_equal(on_devices['messages'], expected.messages, mesh)
        np.testing.assert_array_equal(on_devices['tokens'], expected.tokens, mesh)
        assert on_devices['sent']['move'] == []
    rows = [['all-gather', [16, LIMITS.user_tokens]], ['all-gather', [16]]]  # the windows of eight devices
    assert [sent for sent in found['8x1']['sent']['decode'] if sent[0] == 'all-gather' and sent not in rows] == []
    assert {kind for kind, shape in found['8x1']['sent']['decode'] if shape == []} == {'all-reduce'}
    assert found['8x1']['sent']['feed'] == [['all-reduce', []]]


def test_a_mesh_for_each_side_changes_no_token() -> None:
    """A user whose model is split, beside an assistant whose rows are: on the same four devices, and on two each."""
    found = json.loads(many_devices.run('tests.rollouts.two_meshes').splitlines()[-1])
    expected = static('device')
    for name, devices in (('same', [[0, 1, 2, 3], [0, 1, 2, 3]]), ('other', [[0, 1], [2, 3]])):
        np.testing.assert_array_equal(found[name]['messages'], expected.messages, name)
        np.testing.assert_array_equal(found[name]['tokens'], expected.tokens, name)
        assert found[name]['devices'] == devices


def test_meshes_that_share_only_some_devices() -> None:
    devices = np.array([['first'], ['second'], ['third']])
    meshes = [mock.Mock(devices=of, shape={'data': 2, 'model': 1}) for of in (devices[:2], devices[1:])]
    user, assistant, _ = agents('device')
    own = dataclasses.replace(user, mesh=meshes[1])
    message = 'ModelAgent.mesh: expected the 2 devices of the conversations, or none of them, found 2, 1 of which'
    with pytest.raises(ValueError, match=message):
        check_meshes(own, assistant, ASSISTANT, meshes[0])
    with pytest.raises(ValueError, match=r"view: expected an agent on the mesh \{'data': 2, 'model': 1\} of the"):
        check_meshes(own, assistant, USER, meshes[0])
    check_meshes(own, assistant, ASSISTANT, mock.Mock(devices=devices[:1]))


@pytest.mark.long
def test_batches_and_caches_of_all_sizes(few_programs: pytest.MonkeyPatch) -> None:
    """Each a program for each side, of which one call meets the sum of both numbers at most."""
    few_programs.undo()
    few_programs.setattr(context, 'SMALLEST_CACHE', 16)
    before = feed_rows._cache_size(), decode_block._cache_size()
    found, expected = (
        conversations_of(*agents('device'), samples=4 * SAMPLES, batching=batching)[0]
        for batching in ('continuous', 'static')
    )
    assert_same(found, expected)
    sizes = len(batch_sizes(4 * ROWS, 1)) + len(context.cache_capacities(found.tokens.shape[1]))
    assert sizes == 3 + 3
    for program, count in zip((feed_rows, decode_block), before, strict=True):
        assert 4 < program._cache_size() - count < 2 * sizes
