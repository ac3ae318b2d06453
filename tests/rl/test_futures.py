"""Rewards by futures: what they are the mean of, what is left out, and training by them."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simrl.conversations.chat import ASSISTANT, USER, Chat
from simrl.conversations.records import Example
from simrl.models import sharding
from simrl.rewards.rewards import CAUSES, FAILED, NO_REPLY, NOT_FINITE, Judging, Rewards, Score
from simrl.rl import train
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.futures import FutureScore, FutureSettings, collect_with_futures, mean_of_futures
from simrl.rl.judged import Judged
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Agent, HostAgent, HostConversation, Reply
from simrl.rollouts.collect import collect
from simrl.rollouts.replay import Replay
from simrl.rollouts.trajectories import Trajectories, transcript_of
from tests import kills
from tests.rl import scene, test_train
from tests.rollouts.test_host import CHAT, EXAMPLES, LIMITS, ROWS, SAMPLES, SEED, STEP, agent_of, chatty, partner_of

REASON = 'the line is dead'


@jax.jit
def sum_of_ids(batch: Trajectories) -> Rewards:
    """The sum of all ids of a conversation, and its number of messages."""
    value = jnp.sum(batch.messages, axis=(1, 2)).astype(jnp.float32)
    count = batch.num_messages.astype(jnp.float32)
    return Rewards(value, jnp.ones(value.shape, bool), {'count': count}, jnp.zeros(value.shape, jnp.int32))


def arguments() -> dict[str, Any]:
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    sizes = {'limits': LIMITS, 'samples': SAMPLES}
    return {'chat': CHAT, 'seed': SEED, 'step': STEP, 'view': ASSISTANT, 'mesh': mesh} | sizes


def futures_of(user: Agent, settings: FutureSettings, score: Score = sum_of_ids) -> Judged:
    """With its arrays on the host."""
    found = collect_with_futures(user, agent_of(ASSISTANT), EXAMPLES, FutureScore(score, settings), **arguments())
    batch, rewards = jax.device_get((found.batch, found.rewards))
    return dataclasses.replace(found, batch=batch, rewards=rewards)


@functools.cache
def two_futures() -> Judged:
    return futures_of(agent_of(USER), FutureSettings(samples=2, turns=1))


def test_rewards_are_means_over_futures() -> None:
    """In plain Python, of conversations that are replayed and held here."""
    found, settings = two_futures(), FutureSettings(samples=2, turns=1)
    record = transcript_of(found.batch)
    for turn in range(LIMITS.turns):
        more, totals = min(settings.turns, LIMITS.turns - turn - 1), []
        for number in range(settings.samples if more else 1):
            replay = Replay(record, turn + 1, more, SAMPLES * (1 + number * LIMITS.turns + turn))
            batch, _ = collect(agent_of(USER), agent_of(ASSISTANT), EXAMPLES, replay=replay, **arguments())
            messages = np.asarray(batch.messages)
            assert not messages[:, 2 * (turn + 1 + more) :].any()
            totals.append([sum(int(token) for message in row for token in message) for row in messages])
        for row in range(ROWS):
            happened = record.num_messages[row] >= 2 * turn + 2
            assert found.rewards.valid[row, turn] == happened
            expected = np.mean([total[row] for total in totals]) if happened else 0.0
            assert found.rewards.value[row, turn] == pytest.approx(expected)
    assert found.rewards.value.shape == (ROWS, LIMITS.turns)
    assert found.unjudged == {}
    assert not found.waited


def test_the_last_turn_is_worth_the_conversation_itself() -> None:
    found = two_futures()
    full = found.batch.num_messages == 2 * LIMITS.turns
    expected = jax.device_get(sum_of_ids(found.batch))
    assert full.any()
    np.testing.assert_array_equal(found.rewards.value[full, -1], expected.value[full])
    np.testing.assert_array_equal(found.rewards.parts['count'][full, -1], expected.parts['count'][full])
    short = found.batch.num_messages < 2
    assert np.array_equal(found.rewards.cause == CAUSES.index(NO_REPLY), short)
    assert not found.rewards.valid[short].any()
    assert not found.rewards.parts['futures_left_out'].any()


def test_without_a_turn_more_the_conversation_up_to_the_reply_is_scored() -> None:
    found = futures_of(agent_of(USER), FutureSettings(samples=1, turns=0))
    for row in range(ROWS):
        for turn in range(int(found.batch.num_messages[row]) // 2):
            assert found.rewards.value[row, turn] == found.batch.messages[row, : 2 * turn + 2].sum()
            assert found.rewards.parts['count'][row, turn] == 2 * turn + 2


def test_no_two_futures_draw_the_same() -> None:
    asked: list[tuple[str, int, int]] = []

    def reply(conversation: HostConversation, seed: int) -> Reply:
        asked.append((conversation.example.id, conversation.sample, len(conversation.messages)))
        return Reply('10')

    futures_of(partner_of(reply), FutureSettings(samples=3, turns=1))
    assert len(asked) == len(set(asked))
    futures = [sample for _, sample, _ in asked if sample >= SAMPLES]
    # Three of each of the two turns before the last one.
    assert len(futures) == ROWS * 3 * 2
    assert len(set(futures)) == SAMPLES * 3 * 2


def number_of(conversation: HostConversation) -> int:
    """Which future of its reply it is; -1 in a recorded conversation."""
    return (conversation.sample // SAMPLES - 1) // LIMITS.turns


def test_a_failed_future_is_left_out_and_a_turn_without_any_has_no_reward() -> None:
    def reply(conversation: HostConversation, seed: int) -> Reply:
        failing = {'example-2': (1,), 'example-4': (0, 1)}.get(conversation.example.id, ())
        failed = number_of(conversation) in failing
        return Reply('', failure=REASON) if failed else dataclasses.replace(chatty(conversation, seed), ends=False)

    found, alone = (futures_of(partner_of(reply), FutureSettings(samples, 1)) for samples in (2, 1))
    both, first = found.rewards, alone.rewards
    some, none = slice(2 * SAMPLES, 3 * SAMPLES), slice(4 * SAMPLES, 5 * SAMPLES)
    np.testing.assert_array_equal(both.value[some], first.value[some])
    np.testing.assert_array_equal(both.parts['futures_left_out'][some], [[0.5, 0.5, 0.0]] * SAMPLES)
    assert not np.array_equal(both.value[:SAMPLES], first.value[:SAMPLES])
    assert both.valid[some].all()
    np.testing.assert_array_equal(both.valid[none], [[False, False, True]] * SAMPLES)
    assert not both.value[none, :2].any()
    assert set(both.cause[none].tolist()) == {CAUSES.index(FAILED)}
    assert np.delete(both.cause, np.arange(ROWS)[none]).tolist() == [0] * (ROWS - SAMPLES)
    assert found.unjudged == dict.fromkeys(range(ROWS)[none], REASON)
    assert found.failures == {}


def test_a_conversation_that_failed_has_no_futures() -> None:
    def reply(conversation: HostConversation, seed: int) -> Reply:
        if len(conversation.messages) == 2 and conversation.example.id == 'example-2':
            assert conversation.sample < SAMPLES
            return Reply('', failure=REASON)
        return Reply('10')

    found = futures_of(partner_of(reply), FutureSettings(1, 1))
    failed = list(range(2 * SAMPLES, 3 * SAMPLES))
    assert found.failures == dict.fromkeys(failed, REASON)
    assert np.flatnonzero(~found.rewards.valid.any(axis=1)).tolist() == failed
    assert set(found.rewards.cause[failed].tolist()) == {CAUSES.index(FAILED)}


def test_means_are_over_what_is_valid() -> None:
    """Against a slow loop, with random holes; a reward that is not finite is masked before."""
    random = np.random.default_rng(0)
    rows, turns, samples = 40, 3, 3
    present = np.arange(turns) < random.integers(0, turns + 1, rows)[:, None]
    value = random.normal(size=(turns, samples, rows)).astype(np.float32)
    valid = random.random((turns, samples, rows)) < 0.5
    cause = np.where(valid, 0, random.integers(1, len(CAUSES), valid.shape)).astype(np.int32)
    futures = []
    for turn, i in itertools.product(range(turns), range(samples)):
        fields: dict[str, Any] = {'value': value[turn, i], 'valid': valid[turn, i], 'cause': cause[turn, i]}
        futures.append((turn, present[:, turn], Rewards(**fields, parts={'double': 2 * fields['value']})))
    found = mean_of_futures(futures, rows, turns)
    for row in range(rows):
        causes = [] if present[row].any() else [CAUSES.index(NO_REPLY)]
        for turn in range(turns):
            kept = [value[turn, i, row] for i in range(samples) if valid[turn, i, row] and present[row, turn]]
            assert found.valid[row, turn] == bool(kept)
            assert found.value[row, turn] == pytest.approx(np.mean(kept) if kept else 0.0, abs=1e-6)
            assert found.parts['double'][row, turn] == pytest.approx(2 * np.mean(kept) if kept else 0.0, abs=1e-6)
            left_out = (samples - len(kept)) / samples if present[row, turn] else 0.0
            assert found.parts['futures_left_out'][row, turn] == pytest.approx(left_out)
            if present[row, turn] and not kept:
                causes.append(int(cause[turn, 0, row]))
        assert found.cause[row] == (causes or [0])[0]
    assert {0.0, 1.0} < set(np.round(found.parts['futures_left_out'], 3).ravel().tolist())


def test_scores_that_are_no_rewards_of_conversations() -> None:
    def broken(batch: Trajectories) -> Rewards:
        rewards = sum_of_ids(batch)
        return dataclasses.replace(rewards, value=rewards.value.at[4].set(jnp.nan))

    found = futures_of(agent_of(USER), FutureSettings(1, 1), broken).rewards
    assert not found.valid[4].any()
    assert found.cause[4] == CAUSES.index(NOT_FINITE)
    assert np.isfinite(found.value).all()

    def by_turn(batch: Trajectories) -> Rewards:
        rewards = sum_of_ids(batch)
        each = (jnp.tile(x[:, None], (1, 2)) for x in (rewards.value, rewards.valid))
        return Rewards(*each, {}, rewards.cause)

    with pytest.raises(ValueError, match=r'FutureScore\.score: expected rewards \[B\] of conversations, found \(24, 2'):
        futures_of(agent_of(USER), FutureSettings(1, 1), by_turn)


def test_turns_of_futures_are_counted() -> None:
    assert FutureSettings(3, 4).turns_drawn(5) == 3 * (4 + 3 + 2 + 1)
    assert FutureSettings(2, 1).turns_drawn(LIMITS.turns) == 4
    assert FutureSettings(1, 0).turns_drawn(5) == 0


@pytest.mark.parametrize(
    ('samples', 'turns', 'message'),
    [
        (0, 1, r'samples: expected at least 1, found 0'),
        (1, -1, r'turns: expected at least 0, found -1'),
        (2, 0, r'samples: expected 1 with turns=0, .* found 2'),
    ],
)
def test_settings_that_cannot_be(samples: int, turns: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf'FutureSettings\.{message}'):
        FutureSettings(samples, turns)


# Training.


def rows_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'conversations' / 'rl.jsonl').read_text().splitlines()]


def test_a_step_of_training_by_futures(tmp_path: pathlib.Path, chat: Chat, mesh: Mesh) -> None:
    """Both agents on the device, with a critic: the conversations are what they are without futures."""
    for name, score in (
        ('whole', scene.share_of_low_ids),
        ('futures', FutureScore(scene.share_of_low_ids, FutureSettings(2, 1))),
    ):
        scene.reinforce(
            tmp_path / name,
            chat,
            mesh,
            steps=1,
            loop_settings=scene.loop_settings(saved_conversations=scene.ROWS),
            score=score,
        )
    whole, found = rows_of(tmp_path / 'whole'), rows_of(tmp_path / 'futures')
    assert [row['messages'] for row in found] == [row['messages'] for row in whole]
    for row, one in zip(found, whole, strict=True):
        replies = len(row['messages']) // 2
        assert [value is not None for value in row['reward']] == [i < replies for i in range(scene.LIMITS.turns)]
        if row['end_reason'] == 'turns':
            assert row['reward'][-1] == pytest.approx(one['reward'])
    first = [row['reward'][0] for row in found]
    assert first != [row['reward'] for row in whole]
    (line,) = [json.loads(line) for line in (tmp_path / 'futures' / 'metrics.jsonl').read_text().splitlines()]
    assert line['reward/unjudged'] == line['masked_rows'] == line['unplaced_rewards'] == 0
    assert line['reward/futures_left_out'] == line['skipped'] == 0
    assert line['grad_norm'] > 0


@pytest.mark.long
def test_a_judge_scores_futures_while_others_are_sampled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People off the device, one of whom fails; the run is that of the same score at once."""
    monkeypatch.setattr(test_train, 'STEPS', 1)
    events: list[str] = []

    def start(piece: Trajectories, _: Sequence[Example]) -> Callable[[], tuple[Rewards, Mapping[int, str]]]:
        events.append('start')

        def finish() -> tuple[Rewards, Mapping[int, str]]:
            events.append('finish')
            return jax.device_get(test_train.share_of_tea(piece)), {}

        return finish

    settings = FutureSettings(2, 1)
    for name, score in (('judged', Judging(start)), ('scored', test_train.share_of_tea)):
        test_train.train_tea(tmp_path / name, FutureScore(score, settings), rows_in_flight=test_train.SAMPLES)  # type: ignore[arg-type]
    kills.assert_same_run(tmp_path / 'scored', tmp_path / 'judged')
    # Four pieces of each of the first turn's two futures, and of the last turn, which has one.
    assert events == ['start'] * 12 + ['finish'] * 12
    (line,) = [json.loads(line) for line in (tmp_path / 'judged/metrics.jsonl').read_text().splitlines()]
    assert line['time/waiting_for_judge'] > 0
    assert line['reward/unjudged'] == 1 / len(test_train.EXAMPLES)
    for row in rows_of(tmp_path / 'judged'):
        assert all(value is None for value in row['reward']) == (row['example'] == test_train.FAILING)


@pytest.mark.parametrize(
    ('trained', 'message'),
    [
        ('user', r"RLSettings\.trained: expected 'assistant' for rewards by futures .* 'user'"),
        ('assistant', r'HostAgent\.replayable: expected True for rewards by futures, .* found False'),
    ],
)
def test_without_replies_that_have_futures(
    tmp_path: pathlib.Path, chat: Chat, mesh: Mesh, trained: Literal['user', 'assistant'], message: str
) -> None:
    """Of the user; or in conversations with an agent whose seed is one for all of them."""
    user, helper = scene.sides(chat)
    program = HostAgent(lambda conversations, seeds: [], scene.LIMITS.user_tokens)
    with pytest.raises(ValueError, match=message):
        train.train(
            tmp_path / 'run',
            user if trained == 'user' else program,
            helper,
            chat=chat,
            examples=scene.EXAMPLES,
            score=FutureScore(scene.share_of_low_ids, FutureSettings(1, 1)),
            limits=scene.LIMITS,
            settings=RLSettings(1, 4, 2, (128,), AlgorithmSettings(kl='none'), scene.ADAMW, trained=trained),
            execution=scene.EXECUTION,
            loop_settings=scene.loop_settings(),
            seed=0,
            mesh=mesh,
        )
    assert not (tmp_path / 'run').exists()
