"""Each training goes on after a fault as if there had been none; and what a run of RL must show."""

import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, Chat
from simrl.experiments.outputs import metric_lines
from simrl.models import placement
from simrl.rewards.rewards import Rewards
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.trajectories import Trajectories
from tests import kills
from tests.rl import scene

STEPS, FAULT = 5, 3  # the fault is in the fourth step; the checkpoint is of the first two


ONE_UPDATE = dataclasses.replace(scene.PPO, minibatches=1, microbatches=2)  # a step


class FaultError(Exception):
    pass


class FaultyRows(list):
    """Rows that cannot be read beyond a number of reads."""

    def __init__(self, rows: list[Any], good_reads: int) -> None:
        super().__init__(rows)
        self._good_reads = good_reads

    def __getitem__(self, index: Any) -> Any:
        if self._good_reads == 0:
            raise FaultError
        self._good_reads -= 1
        return super().__getitem__(index)


@pytest.fixture(scope='module')
def reinforced(tmp_path_factory: pytest.TempPathFactory, chat: Chat, mesh: Mesh) -> pathlib.Path:
    """An unbroken run of RL."""
    folder = tmp_path_factory.mktemp('reinforced')
    scene.reinforce(
        folder, chat, mesh, steps=STEPS, loop_settings=scene.loop_settings(checkpoint_every=2), algorithm=ONE_UPDATE
    )
    return folder


def test_reinforcement_goes_on(tmp_path: pathlib.Path, chat: Chat, mesh: Mesh, reinforced: pathlib.Path) -> None:
    calls = itertools.count()

    def failing(batch: Trajectories) -> Rewards:
        if next(calls) == FAULT:
            raise FaultError
        return scene.share_of_low_ids(batch)

    settings = scene.loop_settings(checkpoint_every=2)
    with pytest.raises(FaultError):
        scene.reinforce(tmp_path, chat, mesh, steps=STEPS, loop_settings=settings, score=failing, algorithm=ONE_UPDATE)
    assert [line['step'] for line in metric_lines(tmp_path)] == [1, 2]
    scene.reinforce(tmp_path, chat, mesh, steps=STEPS, loop_settings=settings, score=failing, algorithm=ONE_UPDATE)
    assert next(calls) == FAULT + 1 + STEPS - 2  # the third step again, and no step before it
    kills.assert_same_run(reinforced, tmp_path)


@pytest.mark.parametrize(
    'training', ['fine_tune', *(pytest.param(x, marks=pytest.mark.long) for x in ('adapters', 'fit'))]
)
def test_supervised_training_goes_on(tmp_path: pathlib.Path, chat: Chat, mesh: Mesh, training: str) -> None:
    train = {
        'fine_tune': scene.fine_tune,
        'adapters': functools.partial(scene.fine_tune, lora=scene.LORA),
        'fit': scene.fit,
    }[training]
    rows, per_step = (scene.preference_rows(), scene.ROWS // 2) if training == 'fit' else (scene.sft_rows(), scene.ROWS)
    # A line of three steps straddles the checkpoint.
    evaluation = {} if training == 'fit' else {'evaluate_every': 4}
    settings = scene.loop_settings(log_every=3, checkpoint_every=2, **evaluation)
    unbroken, broken = tmp_path / 'unbroken', tmp_path / 'broken'
    train(unbroken, chat, mesh, steps=STEPS, loop_settings=settings, rows=rows)
    with pytest.raises(FaultError):
        train(
            broken, chat, mesh, steps=STEPS, loop_settings=settings, rows=FaultyRows(rows, good_reads=FAULT * per_step)
        )
    assert (broken / 'checkpoints' / '2').exists()
    train(broken, chat, mesh, steps=STEPS, loop_settings=settings, rows=rows)
    kills.assert_same_run(unbroken, broken)
    losses = [line['loss'] for line in metric_lines(unbroken) if 'loss' in line]
    assert losses[0] != losses[-1]


def test_the_reference_stays_where_the_policy_started(reinforced: pathlib.Path) -> None:
    first, *later = (line['kl_k3'] for line in metric_lines(reinforced))
    assert abs(first) < 1e-7
    assert all(kl > 1e-5 for kl in later)


def talked(chat: Chat, mesh: Mesh, step: int, rows_in_flight: int | None = None) -> Trajectories:
    """The conversations of a step before anything was learnt, on the host."""
    user, helper = scene.sides(chat)
    batch, _ = collect(
        for_sampling(user, mesh),
        for_sampling(helper, mesh),
        scene.EXAMPLES,
        chat=chat,
        limits=scene.LIMITS,
        seed=scene.SEED,
        step=step,
        view=ASSISTANT,
        mesh=mesh,
        samples=2,
        rows_in_flight=rows_in_flight,
    )
    return placement.to_host(batch)


def test_two_epochs_of_one_example_are_different_conversations(chat: Chat, mesh: Mesh) -> None:
    """Of the same two models: all that differs is the step."""
    first, again, second = (talked(chat, mesh, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first.messages, again.messages)
    np.testing.assert_array_equal(first.messages[:, 0], second.messages[:, 0])  # the openings
    assert (first.messages[:, 1:] != second.messages[:, 1:]).any(axis=(1, 2)).all()


def test_rows_in_flight_change_no_token(chat: Chat, mesh: Mesh) -> None:
    whole, pieces = talked(chat, mesh, 0), talked(chat, mesh, 0, rows_in_flight=2)
    for field in dataclasses.fields(Trajectories):
        found, expected = getattr(pieces, field.name), getattr(whole, field.name)
        if field.name == 'log_prob':
            np.testing.assert_allclose(found, expected, atol=1e-5)
        elif field.name != 'loop_steps':  # pieces end when their own rows do
            np.testing.assert_array_equal(found, expected, err_msg=field.name)


@pytest.mark.long
@pytest.mark.parametrize('futures', [False, True])
def test_a_step_with_continuous_batching_is_that_step(
    tmp_path: pathlib.Path, chat: Chat, mesh: Mesh, futures: bool
) -> None:
    """Two conversations at a time, which no update depends on, nor on what follows from each reply."""

    def lines(name: str, **settings: Any) -> list[dict[str, Any]]:
        arguments = {'steps': 2, 'loop_settings': scene.loop_settings(), 'algorithm': ONE_UPDATE, 'rows_in_flight': 2}
        if futures:
            scene.foresee(tmp_path / name, chat, mesh, score=scene.share_of_low_ids, **arguments, **settings)
        else:
            scene.reinforce(tmp_path / name, chat, mesh, **arguments, **settings)
        return metric_lines(tmp_path / name)

    for found, expected in zip(lines('continuous', batching='continuous'), lines('static'), strict=True):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            if not name.startswith('time/') and name != 'rollout/useful_steps' and isinstance(value, float):
                assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_rows_in_flight_must_divide_the_rows(tmp_path: pathlib.Path, chat: Chat, mesh: Mesh) -> None:
    for wrong in (0, 3, 16):
        with pytest.raises(ValueError, match=f'rows_in_flight: .* divisor of the 8 rows of a step, found {wrong}'):
            scene.reinforce(tmp_path, chat, mesh, steps=1, loop_settings=scene.loop_settings(), rows_in_flight=wrong)


def test_a_reward_for_each_turn(tmp_path: pathlib.Path, chat: Chat, mesh: Mesh, reinforced: pathlib.Path) -> None:
    """A whole step, its rows two by two: the messages are what they are without; one turn's judge fails.

    PPO cannot use a conversation with a turn that has no reward, and it counts as unjudged.
    """

    def score(batch: Trajectories) -> Rewards:
        value = jnp.tile(jnp.array([0.25, 0.5]), (scene.ROWS, 1))
        valid = jnp.ones(value.shape, bool).at[3, 1].set(False)
        return Rewards(value, valid, {'half': value / 2}, jnp.where(valid.all(axis=1), 0, 1))

    scene.reinforce(tmp_path, chat, mesh, steps=1, loop_settings=scene.loop_settings(), score=score, rows_in_flight=2)
    (line,) = metric_lines(tmp_path)
    assert line['reward/mean'] == pytest.approx((0.25 + 0.5) / 2)
    assert line['reward/unjudged'] == 1 / scene.ROWS
    assert line['masked_rows'] == 1
    assert line['skipped'] == 0
    found, first = (
        [json.loads(row) for row in (folder / 'conversations' / 'rl.jsonl').read_text().splitlines()][: scene.ROWS]
        for folder in (tmp_path, reinforced)
    )
    assert [row['messages'] for row in found] == [row['messages'] for row in first]
    assert [row['reward'] for row in found] == [[None, None] if i == 3 else [0.25, 0.5] for i in range(scene.ROWS)]
    assert found[0]['parts'] == {'half': [0.125, 0.25]}
    assert all(isinstance(row['reward'], float) for row in first)
