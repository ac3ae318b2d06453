"""One piece of a step is sampled while another waits for replies off the device, and nobody can tell by the results."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.conversations.chat import ASSISTANT, USER
from simrl.conversations.records import Example
from simrl.models import sharding
from simrl.rollouts import dialogue as dialogue_lib
from simrl.rollouts.agents import HostAgent, HostConversation, Reply
from simrl.rollouts.collect import PIECES_AT_ONCE, collect
from simrl.rollouts.interleave import Threads, interleave
from simrl.rollouts.state import Dialogue
from simrl.rollouts.trajectories import Trajectories
from tests.rollouts import test_host as scene

GIVEN = [example for example in scene.EXAMPLES if example.opening is not None]
PIECE = 8  # rows, a third of all
TIMEOUT = 60.0


@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 4))
def test_generators_take_turns_and_results_keep_their_order(yields: list[int], at_once: int) -> None:
    steps: list[int] = []
    running: set[int] = set()

    def counting(number: int) -> Generator[None, None, int]:
        running.add(number)
        assert len(running) <= at_once
        for _ in range(yields[number]):
            steps.append(number)
            yield
        running.remove(number)
        return -number

    assert list(interleave(map(counting, range(len(yields))), at_once)) == [-number for number in range(len(yields))]
    assert sorted(steps) == [number for number, count in enumerate(yields) for _ in range(count)]
    if at_once == 1:
        assert steps == sorted(steps)
    if at_once >= len(yields):
        assert steps == [number for turn in range(4) for number, count in enumerate(yields) if turn < count]


Piece = tuple[list[str], np.ndarray]


def held(
    role: int,
    reply: Callable[[Sequence[HostConversation], np.ndarray], Sequence[Reply]],
    calls_at_once: int,
    examples: Sequence[Example] = scene.EXAMPLES,
) -> tuple[Trajectories, Mapping[int, str], list[Piece], list[float]]:
    """In three pieces conversations of `role` on the device with a partner off it; the pieces; and the waits."""
    limits = scene.LIMITS
    partner = HostAgent(
        reply, limits.assistant_tokens if role == USER else limits.user_tokens, calls_at_once=calls_at_once
    )
    own, pieces, waits = scene.agent_of(role), list[Piece](), list[float]()
    batch, failures = collect(
        *((own, partner) if role == USER else (partner, own)),
        examples,
        chat=scene.CHAT,
        limits=limits,
        seed=scene.SEED,
        step=scene.STEP,
        view=role,
        mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
        samples=scene.ROWS // len(examples),
        rows_in_flight=PIECE,
        on_piece=lambda piece, of_rows: pieces.append(([e.id for e in of_rows], jax.device_get(piece.messages))),
        on_wait=waits.append,
    )
    return jax.device_get(batch), failures, pieces, waits


def unsteady(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
    """Chats, fails in some conversations, and keeps the first example's waiting for longest."""
    time.sleep(0.03 if conversations[0].example.id == scene.EXAMPLES[0].id else 0.002 * (int(seeds[0]) % 5))
    return [
        Reply('', failure=f'{conversation.example.id}, {conversation.sample}: no answer')
        if seed % 7 == 0 and len(conversation.messages) > 1
        else scene.chatty(conversation, seed)
        for conversation, seed in zip(conversations, seeds.tolist(), strict=True)
    ]


@functools.cache
def one_after_the_other(role: int) -> tuple[Trajectories, Mapping[int, str], list[Piece], list[float]]:
    return held(role, unsteady, calls_at_once=0)


@pytest.mark.parametrize('calls_at_once', [1, 2])
@pytest.mark.parametrize('role', [USER, ASSISTANT])
def test_nothing_depends_on_what_is_done_meanwhile(role: int, calls_at_once: int) -> None:
    expected, reasons, pieces, waits = one_after_the_other(role)
    asking, most = 0, 0
    caller = threading.current_thread()
    counting = threading.Lock()

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        nonlocal asking, most
        assert threading.current_thread() is not caller
        with counting:
            asking += 1
            most = max(most, asking)
        replies = unsteady(conversations, seeds)
        with counting:
            asking -= 1
        return replies

    batch, failures, found, own_waits = held(role, reply, calls_at_once)
    assert most <= calls_at_once
    assert len(own_waits) == len(waits) > 3
    assert failures == reasons
    assert len({row // PIECE for row in failures}) > 1
    for row, reason in failures.items():
        example, sample = divmod(row, scene.SAMPLES)
        assert reason == f'example-{example}, {sample}: no answer'
    for field in dataclasses.fields(Trajectories):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(expected, field.name), field.name)
    assert [ids for ids, _ in found] == [ids for ids, _ in pieces]
    assert [ids[0] for ids, _ in found] == ['example-0', 'example-2', 'example-4']
    for (_, messages), (_, others) in zip(found, pieces, strict=True):
        np.testing.assert_array_equal(messages, others)


@pytest.mark.parametrize('calls_at_once', [0, 1, 2])
def test_one_piece_is_sampled_while_another_waits(monkeypatch: pytest.MonkeyPatch, calls_at_once: int) -> None:
    """The first call of the partner returns once the second piece has its first message of the device."""
    events: list[str] = []
    asked, second = threading.Event(), threading.Event()
    add_message = dialogue_lib.add_message

    def recorded(*args: object, role: int) -> Dialogue:
        if events.count('sampled') == 1 and calls_at_once:
            assert asked.wait(TIMEOUT)
        dialogue = add_message(*args, role=role)  # type: ignore[arg-type]
        jax.block_until_ready(dialogue.num_messages)
        events.append('sampled')
        if events.count('sampled') == 2:
            second.set()
        return dialogue

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        if not asked.is_set():
            events.append('asked')
            asked.set()
            second.wait(TIMEOUT if calls_at_once else 0.01)
            events.append('replied')
        return [Reply('10') for _ in conversations]

    monkeypatch.setattr(dialogue_lib, 'add_message', recorded)
    held(ASSISTANT, reply, calls_at_once, GIVEN)
    meanwhile = ['asked', 'sampled', 'replied'] if calls_at_once else ['asked', 'replied', 'sampled']
    assert events[:4] == ['sampled', *meanwhile]


def test_an_agent_that_allows_it_is_asked_twice_at_once() -> None:
    both = threading.Barrier(PIECES_AT_ONCE)

    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        if not conversations[0].messages and conversations[0].example.id != 'example-4':  # of the third piece
            both.wait(TIMEOUT)
        return [Reply('10') for _ in conversations]

    _, failures, pieces, _ = held(ASSISTANT, reply, calls_at_once=2)
    assert not failures
    assert len(pieces) == 3


@pytest.mark.parametrize('calls_at_once', [0, 1, 2])
def test_errors_of_the_agent_are_raised(calls_at_once: int) -> None:
    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        if conversations[0].example.id == 'example-2':  # of the second piece
            raise OSError('no line')
        return [Reply('10') for _ in conversations]

    with pytest.raises(OSError, match=r'^no line$'):
        held(ASSISTANT, reply, calls_at_once)
    with pytest.raises(ValueError, match=r'HostAgent.reply: expected 4 replies, found 0'):
        held(ASSISTANT, lambda conversations, seeds: [], calls_at_once)


def test_closed_threads_begin_no_call_and_keep_no_process() -> None:
    begun, go = threading.Event(), threading.Event()
    calls: list[str] = []
    threads = Threads(1)

    def first() -> str:
        begun.set()
        assert go.wait(TIMEOUT)
        return 'first'

    before = set(threading.enumerate())
    wait = threads.start(first)
    assert begun.wait(TIMEOUT)
    threads.start(lambda: calls.append('second'))
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    assert all(thread.daemon for thread in own)
    threads.close()
    go.set()
    assert wait() == 'first'
    for thread in own:
        thread.join(TIMEOUT)
    assert calls == []


def test_a_negative_number_of_calls_is_refused() -> None:
    with pytest.raises(ValueError, match=r'HostAgent.calls_at_once: expected at least 0, found -1'):
        HostAgent(unsteady, 4, calls_at_once=-1)
