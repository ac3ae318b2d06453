"""Which rows decode when: whole conversations with planted lengths, on the host alone."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.chat import ASSISTANT, TEMPLATE, USER
from simrl.models import sharding
from simrl.models.transformer import Execution
from simrl.rollouts import continuous, flight, schedule
from simrl.rollouts.agents import GenerationSpec, Limits, Policy
from simrl.rollouts.compaction import batch_sizes
from simrl.rollouts.context import PREFIX
from simrl.rollouts.histories import Histories, start_histories
from simrl.rollouts.prompts import PromptRows, Prompts
from simrl.rollouts.state import EndReason
from simrl.rollouts.window import Asked, Block, Given
from tests.tiny import tiny_config

END, STOP = 1, 2
TURNS = 5


def specs(longest: int) -> tuple[GenerationSpec, GenerationSpec]:
    def of(role: int) -> GenerationSpec:
        own, partner = ((3, 4), (5,)) if role == USER else ((5,), (3, 4))
        return GenerationSpec(
            config=tiny_config(60, max_positions=4096),
            execution=Execution(),
            role=role,
            own_header=own,
            partner_header=partner,
            own_first_header=own,
            partner_first_header=partner,
            end_of_turn=END,
            partner_end_of_turn=END,
            max_new_tokens=longest,
            stop_sequences=((STOP,),) if role == USER else (),
        )

    return of(USER), of(ASSISTANT)


def prompts_of(rows: int) -> Prompts:
    def view(width: int) -> PromptRows:
        length = 1 + np.arange(rows, dtype=np.int32) % width
        tokens = 10 + (np.arange(rows)[:, None] + np.arange(width)) % 40
        return PromptRows(
            tokens.astype(np.int32),
            np.full((rows, width), TEMPLATE, np.int8),
            np.full((rows, width), PREFIX, np.int16),
            length,
        )

    none, zeros = np.zeros(rows, bool), np.zeros(rows, np.int32)
    return Prompts(
        user=view(9),
        assistant=view(3),
        opening=np.zeros((rows, 9), np.int32),
        opening_length=zeros,
        given=none,
        truncated=none,
        end_reason=zeros.astype(np.int8),
        example=zeros.astype(np.uint32),
        sample=zeros,
        group=zeros,
        resamples=zeros,
    )


class Device:
    """What the programs of `window` do, for models whose messages have planted lengths: a cache is the tokens fed.

    Attributes:
        planted: int `[N, M]`, tokens of each message, its end included; where 0, the message before ends with a stop.
        blocks: the steps of each block.
    """

    def __init__(self, planted: np.ndarray, longest: int, rows: int, shards: int) -> None:
        self.planted, self.longest, self.rows, self.shards = planted, longest, rows, shards
        self.blocks: list[int] = []
        self.calls = 0

    def new_caches(self, spec: GenerationSpec, level: schedule.Level, shards: int, capacity: int) -> Any:
        return [np.full((shards, rows, capacity), -1) for rows in (level.window, level.parked)]

    def grow(self, spec: GenerationSpec, caches: Any, sizes: Sequence[int]) -> Any:
        more = max(0, sizes[-1] - caches[0].shape[2])
        return [np.pad(x, ((0, 0), (0, 0), (0, more)), constant_values=-1) for x in caches]

    def regroup(self, spec: GenerationSpec, caches: Any, index: np.ndarray, level: schedule.Level) -> Any:
        rows = np.take_along_axis(np.concatenate(caches, axis=1), index[:, :, None], axis=1)
        return [rows[:, : level.window], rows[:, level.window :]]

    def enter(self, policy: Policy, caches: Any, given: Given) -> Any:
        self.calls += 1
        window, parked = (x.copy() for x in caches)
        for device in range(self.shards):
            for number in range(given.rows[device]):
                place, out = given.places[device, number], given.parked[device, number]
                if given.outside[device, number]:
                    left = window[device, place].copy()
                    window[device, place], parked[device, out] = parked[device, out], left
                at = device * given.places.shape[1] + number
                start, count = given.start[at], given.count[at]
                assert 0 <= count <= given.tokens.shape[1]
                window[device, place, start : start + count] = given.tokens[at, :count]
        return [window, parked]

    def decode_block(self, policy: Policy, caches: Any, asked: Asked, *, steps: int) -> tuple[Any, Block]:
        side = 0 if policy.spec.role == USER else 1
        window = caches[0].reshape(-1, caches[0].shape[2]).copy()
        rows = len(window)
        tokens, count = np.zeros((rows, steps), np.int32), np.zeros(rows, np.int32)
        done, stopped = np.zeros(rows, bool), np.zeros(rows, bool)
        pending, step = asked.pending.copy(), 0
        assert asked.active.any()
        for row in np.flatnonzero(asked.active):
            history = self.h.view(side)
            of = int(asked.key[row, 0])
            assert asked.message[row] % 2 == side
            assert asked.position[row] == history.length[of] - 1
            # The cache has all of the conversation but its last token, whatever it has after it.
            np.testing.assert_array_equal(window[row, : asked.position[row]], history.tokens[of, : asked.position[row]])
            assert asked.position[row] + steps <= window.shape[1] or window.shape[1] == history.capacity
        while step < steps and (asked.active & ~done).any():
            if done.sum() >= asked.limit and step >= asked.least:
                break
            for row in np.flatnonzero(asked.active & ~done):
                of, message = int(asked.key[row, 0]), int(asked.message[row])
                window[row, asked.position[row] + step] = pending[row]
                last = asked.step[row] + step + 1 == self.planted[of, message]
                ends = message + 1 < 2 * TURNS and side == 0 and self.planted[of, message + 1] == 0
                cut = asked.step[row] + step + 1 == self.longest
                token = 10 + (of + message + step) % 40
                if last and not cut:
                    token = STOP if ends else END
                tokens[row, step] = pending[row] = token
                count[row] += 1
                done[row], stopped[row] = last | cut, token == STOP
            step += 1
        self.blocks.append(step)
        block: list[Any] = [tokens, np.zeros((rows, steps), np.float32), count, done, stopped, np.int32(step)]
        return [window.reshape(caches[0].shape), caches[1]], Block(*block)

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> Histories:
        longest = self.longest
        both = specs(longest)
        for module, names in ((flight, ('new_caches', 'grow', 'regroup', 'enter')), (continuous, ('decode_block',))):
            for name in names:
                monkeypatch.setattr(module, name, getattr(self, name))
        monkeypatch.setattr(flight, 'parts_of', lambda *_: self.shards)
        limits = Limits(turns=TURNS, prompt_tokens=9, assistant_tokens=longest, user_tokens=longest)
        number = len(self.planted)
        self.h = start_histories(both, prompts_of(number), limits=limits, max_new_tokens=(longest, longest))
        policies = [Policy(None, np.ones(1, bool), 1.0, spec) for spec in both]
        keys = np.stack([np.arange(number), np.zeros(number)], axis=1).astype(np.uint32)
        meshes = (sharding.make_mesh(1, 1, jax.devices()[:1]),) * 2
        for _ in continuous.holding(policies, self.h, keys, meshes=meshes, in_flight=self.rows):
            pass
        return self.h


def planted(rows: int, mean: float, longest: int, ends: float, seed: int = 0) -> np.ndarray:
    """Lengths with an exponential distribution, cut at the longest; after a message of the user a share `ends` end."""
    random = np.random.default_rng(seed)
    lengths = np.clip(np.ceil(random.exponential(mean, (rows, 2 * TURNS))), 1, longest).astype(int)
    over = np.cumsum((random.random((rows, TURNS)) < ends) & (lengths[:, ::2] < longest), axis=1) > 0
    lengths[:, 1:-1:2][over[:, :-1]] = 0  # the assistant's message after it is not said
    for row in lengths:
        row[np.cumsum(row == 0) > 0] = 0
    return lengths


def static_share(planted: np.ndarray, rows: int) -> float:
    """The useful share of row-steps message by message, each as long as its longest row, the batch compacted."""
    useful = total = 0
    for start in range(0, len(planted), rows):
        for said in planted[start : start + rows].T:
            running = int((said > 0).sum())
            size = min(size for size in batch_sizes(rows, 1) if size >= running) if running else 0
            useful, total = useful + int(said.sum()), total + int(said.max()) * size
    return useful / total


def share(h: Histories) -> float:
    return float(h.decoded_steps.sum() / h.loop_steps.sum())


@pytest.mark.parametrize(
    ('number', 'rows', 'shards', 'ends'), [(64, 64, 1, 0.0), (64, 64, 1, 0.25), (64, 32, 1, 0.25), (64, 64, 2, 0.0)]
)
def test_four_of_five_row_steps_are_useful_where_one_of_three_was(
    number: int, rows: int, shards: int, ends: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = planted(number, 21.5, 64, ends)
    said = lengths[lengths > 0]
    assert 0.3 < said.mean() / said.max() < 0.36
    device = Device(lengths, 64, rows, shards)
    h = device.hold(monkeypatch)
    assert static_share(lengths, rows) < 0.36
    assert share(h) > 0.8
    assert h.decoded_steps.sum() == said.sum()
    assert len(device.blocks) < h.decoded_steps.sum() / 20  # waits of the host


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.sampled_from([1, 2, 6, 16, 24]),
    pieces=st.integers(1, 3),
    shards=st.sampled_from([1, 2]),
    longest=st.integers(1, 9),
    ends=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_conversation_is_told_to_its_end(
    seed: int, rows: int, pieces: int, shards: int, longest: int, ends: float
) -> None:
    """`Device` checks that caches have what the conversations have."""
    shards = shards if rows % 2 == 0 else 1
    lengths = planted(rows * pieces, 4, longest, ends, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        h = Device(lengths, longest, rows, shards).hold(monkeypatch)
    np.testing.assert_array_equal(h.num_messages, (lengths > 0).sum(axis=1))
    whole = (lengths > 0).all(axis=1)
    cut = (lengths == longest) & (lengths > 0)
    np.testing.assert_array_equal(h.end_reason == EndReason.TURNS, whole)
    np.testing.assert_array_equal(h.truncated & (lengths > 0), cut)
    np.testing.assert_array_equal(h.end_reason[~whole], EndReason.SIGNAL)
    np.testing.assert_array_equal(h.decoded_steps, lengths.sum(axis=1))


def test_a_window_is_full_while_most_rows_run() -> None:
    """Whichever way the rows are divided between the sides."""
    level = schedule.levels(64, 1, 2)[0]
    for user in range(65):
        waiting = np.array([[user], [64 - user]])
        side = schedule.choose_side(waiting, level.window, 0)
        assert waiting[side, 0] >= level.window
    assert [level.window for level in schedule.levels(64, 1, 1)] == [64, 32, 16]  # one side: none waits for another


def test_those_with_the_fewest_messages_enter_first() -> None:
    place = np.array([3, 0, 1, 2, 4])
    wanted = np.array([True, False, True, True, True])
    said = np.array([4, 0, 0, 2, 0])
    assert schedule.exchanges(place, wanted, said, 2) == [(4, 1)]
    assert schedule.exchanges(place, wanted, said, 3) == [(4, 1)]
    assert schedule.exchanges(place, np.array([True, False, False, False, True]), said, 3) == [(4, 1), (0, 2)]
