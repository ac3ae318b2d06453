"""Answers of an engine: those of a slow loop over whole rows, whatever else is asked at the same time."""

import dataclasses
import time
import weakref
from typing import Any

import jax
import numpy as np
import pytest

from simrl.rollouts.token_sampling import Sampling
from simrl.run.compiles import compilations
from simrl.serving import device, slots
from simrl.serving.engine import Engine
from simrl.serving.generation import Event, Failure, Generation, Piece, QueueFullError
from tests.serving import scene
from tests.serving.scene import CHAT, CONTEXT, answers, joined, slow

SAMPLINGS = (Sampling(0.0), Sampling(), Sampling(0.7, top_p=0.8), Sampling(1.3, top_k=4), Sampling(1.0, min_p=0.2))


def requests(number: int, seed: int = 0) -> list[Generation]:
    """Requests of all kinds; some prompts begin alike, some go on from others."""
    random = np.random.default_rng(seed)
    starts = [random.integers(0, 256, n).tolist() for n in (3, 20, 33)]
    found = []
    for i in range(number):
        prompt = [*starts[i % 3], *random.integers(0, 256, random.integers(0, 12)).tolist()]
        found.append(
            Generation(
                prompt=tuple(prompt),
                max_tokens=int(random.integers(1, 18)),
                sampling=SAMPLINGS[i % 5],
                seed=int(random.integers(0, 2**40)) if i % 4 else i,
                sample=i % 2,
                vocabulary='all' if i % 7 == 0 else 'chat',
                stop_ids=(CHAT.encode('a')[0],) if i % 6 == 0 else (),
                log_probs=i % 3 == 0,
                top=5 if i % 9 == 0 else 0,
            )
        )
    return found


def test_every_answer_is_that_of_the_slow_loop_and_of_the_request_alone() -> None:
    asked = requests(40)
    together = [joined(events) for events in answers(scene.engine(), asked)]
    for generation, found in zip(asked, together, strict=True):
        ids, ended = slow(generation)
        assert list(found.tokens) == ids
        assert found.finish == ('stop' if ended else 'length')
        assert found.stop == (ids[-1] if ended and ids[-1] in generation.stop_ids else None)
    alone = [joined(answers(scene.engine(), [generation])[0]) for generation in asked[:12]]
    for one, other in zip(alone, together, strict=False):
        assert (one.text, one.tokens, one.finish, one.stop) == (other.text, other.tokens, other.finish, other.stop)
        np.testing.assert_allclose([s.log_prob for s in one.scores], [s.log_prob for s in other.scores], atol=1e-5)


def test_answers_are_the_same_whenever_others_come_and_go() -> None:
    engine, random = scene.engine(), np.random.default_rng(0)
    asked = requests(60, seed=11)
    found: list[list[Event]] = []
    cancelled = set()
    while len(found) < len(asked) or engine.busy:
        for _ in range(random.integers(0, 4)):
            if len(found) < len(asked):
                found.append([])
                number = engine.submit(asked[len(found) - 1], found[-1].append)
                if random.random() < 0.1:
                    engine.cancel(number)
                    cancelled.add(len(found) - 1)
        engine.step()
    assert 2 < len(cancelled) < 20
    for i, (generation, events) in enumerate(zip(asked, found, strict=True)):
        if i in cancelled:
            assert isinstance(events[-1], Failure)
        else:
            assert list(joined(events).tokens) == slow(generation)[0]


def test_the_smallest_temperatures_are_greedy() -> None:
    base = Generation(prompt=(250, 3), max_tokens=12, sampling=Sampling(0.0), seed=1, log_probs=True, top=2)
    asked = [dataclasses.replace(base, sampling=Sampling(t)) for t in (0.0, 1e-300, 1e-40, 1e-37)]
    greedy, *others = (joined(events) for events in answers(scene.engine(), asked))
    for found in others:
        assert found.tokens == greedy.tokens
        np.testing.assert_allclose([x.log_prob for x in found.scores], [x.log_prob for x in greedy.scores], atol=1e-5)


def test_log_probs_are_those_of_what_was_drawn_from() -> None:
    prompt = tuple(CHAT.encode('abc'))
    mask = np.asarray(scene.agent().policy.token_mask)
    for sampling in SAMPLINGS:
        generation = Generation(prompt=prompt, max_tokens=9, sampling=sampling, seed=2, log_probs=True, top=4)
        found = joined(answers(scene.engine(), [generation])[0])
        logits = np.where(mask, scene.logits_of([*prompt, *found.tokens])[len(prompt) - 1 : -1], -np.inf)
        weight = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64) / (sampling.temperature or 1.0))
        if sampling.top_k:
            weight[weight < np.sort(weight, axis=1)[:, [-sampling.top_k]]] = 0
        if sampling.top_p < 1:
            order = -np.sort(-weight, axis=1)
            enough = np.argmax(order.cumsum(1) >= sampling.top_p * order.sum(1, keepdims=True), axis=1)
            weight[weight < np.take_along_axis(order, enough[:, None], axis=1)] = 0
        weight[weight < sampling.min_p] = 0
        with np.errstate(divide='ignore'):
            expected = np.log(weight / weight.sum(1, keepdims=True))
        for row, score, token in zip(expected, found.scores, found.tokens, strict=True):
            assert score.id == token
            assert score.log_prob == pytest.approx(row[token], abs=2e-5)
            assert [x for _, x in score.top] == pytest.approx([x for x in -np.sort(-row)[:4] if x > -np.inf], abs=2e-5)
            assert all(x == pytest.approx(row[i], abs=2e-5) for i, x in score.top)


def test_prompts_are_scored_by_the_model_alone() -> None:
    random = np.random.default_rng(1)
    asked = [
        Generation(
            prompt=tuple(random.integers(0, CHAT.size - 1, n).tolist()),
            max_tokens=tokens,
            sampling=Sampling(0.5, top_k=3),
            seed=0,
            top=2,
            score_prompt=True,
        )
        for n, tokens in ((1, 0), (2, 0), (9, 1), (30, 0), (30, 4), (CONTEXT, 0))
    ]
    for generation, events in zip(asked, answers(scene.engine(), asked), strict=True):
        found, prompt = joined(events), generation.prompt
        expected = np.asarray(jax.nn.log_softmax(scene.logits_of(list(prompt))[:, : CHAT.size - 1]))
        assert [score.id for score in found.prompt_scores] == list(prompt[1:])
        for row, score in zip(expected, found.prompt_scores, strict=False):
            assert score.log_prob == pytest.approx(row[score.id], abs=2e-5)
            assert [x for _, x in score.top] == pytest.approx((-np.sort(-row))[:2].tolist(), abs=2e-5)
        assert list(found.tokens) == slow(generation)[0]


def test_a_chat_that_goes_on_is_fed_what_is_new() -> None:
    engine, cached = scene.engine(), []
    before_all = engine.load().cached_tokens_total
    said = [255, *CHAT.encode('abcd')]  # no other prompt begins so
    for turn in range(3):
        generation = Generation(prompt=tuple(said), max_tokens=6, sampling=Sampling(), seed=turn)
        found = joined(answers(engine, [generation])[0])
        cached.append(found.cached)
        assert list(found.tokens) == slow(generation)[0]
        before, said = len(said) + len(found.tokens), [*said, *found.tokens, *CHAT.encode('efgh')]
        # Others have all rows but one meanwhile.
        answers(engine, [dataclasses.replace(one, score_prompt=True) for one in requests(4, seed=turn)])
        cached.append(before - 1)
    assert cached[0] == 0
    assert cached[2::2] == cached[1:-1:2]
    load = engine.load()
    assert load.cached_tokens_total - before_all == sum(cached[::2])


def test_a_prompt_starts_from_any_row_that_begins_like_it() -> None:
    engine = scene.engine()
    shared = [254, *np.random.default_rng(5).integers(0, 256, 29).tolist()]
    asked = [Generation(prompt=(*shared, i), max_tokens=3, sampling=Sampling(), seed=i) for i in range(4)]
    first = joined(answers(engine, asked[:1])[0])
    assert first.cached == 0
    for generation, events in zip(asked, answers(engine, asked), strict=True):
        found = joined(events)
        assert found.cached == 30
        assert list(found.tokens) == slow(generation)[0]


def test_stop_texts_end_answers_before_them_and_free_the_row() -> None:
    engine = scene.engine()
    base = Generation(
        prompt=tuple(CHAT.encode('abc')), max_tokens=40, sampling=Sampling(1.5), seed=3, vocabulary='chat'
    )
    whole = joined(answers(engine, [base])[0])
    assert len(whole.text) > 12
    stop = whole.text[8:10]
    cut = whole.text[: whole.text.index(stop)]
    others = requests(12, seed=9)
    for keep in (False, True):
        generation = dataclasses.replace(base, stop=('never', stop), keep_stop=keep)
        found, *rest = map(joined, answers(engine, [generation, *others]))
        assert (found.text, found.finish, found.stop) == (cut + stop * keep, 'stop', stop)
        assert whole.tokens[: len(found.tokens)] == found.tokens
        assert [list(x.tokens) for x in rest] == [slow(one)[0] for one in others]
    assert engine.load().active == 0


class Only:
    """A constraint on the answer: a text, and then nothing."""

    def __init__(self, text: str) -> None:
        self.left = CHAT.encode(text)

    def allowed(self) -> np.ndarray:
        bits = np.zeros(-(-scene.CONFIG.padded_vocab_size // 32) * 32, np.uint8)
        bits[self.left[0]] = 1
        return np.packbits(bits, bitorder='little').view(np.uint32)

    def advance(self, token: int) -> bool:
        assert token == self.left.pop(0)
        return not self.left


class DeadEnd(Only):
    """A text that cannot be ended."""

    def allowed(self) -> np.ndarray:
        if not self.left:
            raise ValueError('no token may follow')
        return super().allowed()

    def advance(self, token: int) -> bool:
        super().advance(token)
        return False


def test_a_constraint_binds_its_own_row_alone() -> None:
    others = requests(10, seed=4)
    base = Generation(prompt=(1, 2), max_tokens=20, sampling=Sampling(), seed=0)
    bound = [dataclasses.replace(base, constraint=Only(text), max_tokens=n) for text, n in (('abba', 4), ('[é]', 20))]
    found = [joined(x) for x in answers(scene.engine(), [*bound, *others])]
    assert [(x.text, x.finish) for x in found[:2]] == [('abba', 'stop'), ('[é]', 'stop')]
    assert [list(x.tokens) for x in found[2:]] == [slow(one)[0] for one in others]


def test_a_constraint_that_allows_nothing_fails_its_request_alone() -> None:
    other = requests(1, seed=5)
    bound = Generation(prompt=(1, 2), max_tokens=20, sampling=Sampling(), seed=0, constraint=DeadEnd('ab'))
    stopped = dataclasses.replace(bound, constraint=DeadEnd('ab'), stop=('b',))
    failed, ended, found = answers(scene.engine(), [bound, stopped, *other])
    assert failed[-1] == Failure('constraint', 'no token may follow')
    assert (joined(ended).text, joined(ended).stop) == ('a', 'b')
    with pytest.raises(ValueError, match='no token may follow'):
        scene.engine().submit(dataclasses.replace(bound, constraint=DeadEnd('')), lambda event: None)
    assert list(joined(found).tokens) == slow(*other)[0]
    assert scene.engine().load().active == 0


def test_requests_end_when_they_are_cancelled_or_late_and_others_go_on() -> None:
    engine, found = scene.engine(), [[] for _ in range(12)]
    asked = [dataclasses.replace(one, max_tokens=18, stop_ids=()) for one in requests(12, seed=2)]
    asked[7] = dataclasses.replace(asked[7], deadline=time.monotonic() - 1)
    numbers = [engine.submit(one, events.append) for one, events in zip(asked, found, strict=True)]
    engine.step()
    assert engine.load().active == 5
    assert engine.load().waiting == 6
    for i in (0, 3, 11):  # two that have rows, one that waits
        engine.cancel(numbers[i])
    engine.cancel(10**9)
    while engine.busy:
        engine.step()
    for i, (generation, events) in enumerate(zip(asked, found, strict=True)):
        if i in (0, 3, 7, 11):
            assert [event.cause for event in events if isinstance(event, Failure)] == [
                'deadline' if i == 7 else 'cancelled'
            ]
            assert isinstance(events[-1], Failure)
        else:
            assert list(joined(events).tokens) == slow(generation)[0]
    assert engine.load().active == engine.load().waiting == 0


def test_a_full_queue_refuses_and_says_when_to_try_again() -> None:
    engine = scene.engine()
    (one,) = requests(1)
    found = []
    for _ in range(scene.SETTINGS.queue):
        engine.submit(one, found.append)
    with pytest.raises(QueueFullError, match='try again in') as caught:
        engine.submit(one, found.append)
    assert caught.value.retry_after >= 1
    refused = engine.load().refused_total
    engine.fail_all('draining', 'test')
    assert refused == 1
    assert [event.cause for event in found] == ['draining'] * scene.SETTINGS.queue


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'prompt': ()}, 'prompt: expected at least one token'),
        ({'max_tokens': 0}, 'max_tokens: expected at least 1, found 0'),
        ({'max_tokens': 63}, 'the 64 tokens of the context, max_tokens included, found 2 \\+ 63, 1 too many'),
        ({'prompt': (3, 9999)}, 'token ids from 0 to 259, found 9999'),
        ({'stop_ids': tuple(range(17))}, 'at most 16, found 17'),
    ],
)
def test_what_cannot_be_answered_is_refused(changes, message) -> None:
    base = Generation(prompt=(1, 2), max_tokens=1, sampling=Sampling(), seed=0)
    with pytest.raises(ValueError, match=message):
        scene.engine().submit(dataclasses.replace(base, **changes), lambda event: None)


def test_nothing_is_compiled_while_requests_are_answered() -> None:
    engine = scene.engine()
    answers(engine, requests(3, seed=7))
    with compilations() as compiled:
        answers(engine, [*requests(30, seed=8), dataclasses.replace(requests(1)[0], score_prompt=True)])
    assert not compiled


def test_a_fault_fails_the_requests_and_the_next_are_answered(monkeypatch, capsys) -> None:
    engine = scene.engine()
    asked = requests(8, seed=6)
    old: list[weakref.ref[jax.Array]] = []

    def broken(self: Engine) -> Any:
        if not self._device.busy:
            return []
        old.append(weakref.ref(self._device._cache.value[0]))
        raise RuntimeError('out of memory')

    def init_rows(*arguments: Any) -> Any:
        assert old.pop()() is None, 'there may be no room for both'
        return slots.init_rows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine), '_read', broken)
        patch.setattr(device, 'init_rows', init_rows)
        found = answers(engine, asked)
    assert [[event.cause for event in events if isinstance(event, Failure)] for events in found] == [['internal']] * 8
    assert 'out of memory' in capsys.readouterr().err
    assert [list(joined(x).tokens) for x in answers(engine, asked)] == [slow(one)[0] for one in asked]
    assert not any(isinstance(x, Piece) and x.finish for events in found for x in events)


def test_the_end_of_an_answer_does_not_wait_for_the_prompts_of_others() -> None:
    engine, (short, long) = scene.engine(), requests(2)
    found: list[list[Event]] = [[], []]
    engine.submit(dataclasses.replace(short, prompt=(1, 2), max_tokens=3), found[0].append)
    engine.step()
    assert not found[0]
    engine.submit(dataclasses.replace(long, prompt=(253,) * 60, max_tokens=1), found[1].append)
    engine.step()
    assert joined(found[0]).finish
    assert not found[1]
    while engine.busy:
        engine.step()
    assert joined(found[1]).finish


def test_a_client_that_cannot_take_its_answer_harms_no_other(capsys) -> None:
    engine, asked = scene.engine(), requests(9, seed=12)
    cancelled = engine.load().finished_total.get('cancelled', 0)
    found: list[list[Event]] = [[] for _ in asked]
    broken = dataclasses.replace(asked[0], prompt=(252, 1), max_tokens=30, stop_ids=())

    def deliver(event: Event) -> None:
        raise OSError('its loop is closed')

    for one, events in zip(asked, found, strict=True):
        engine.submit(broken, deliver)
        engine.submit(one, events.append)
    while engine.busy:
        engine.step()
    assert [list(joined(x).tokens) for x in found] == [slow(one)[0] for one in asked]
    assert engine.load().finished_total.get('cancelled', 0) > cancelled
    assert 'its loop is closed' in capsys.readouterr().err
    engine.submit(broken, deliver)
    engine.fail_all('draining', 'test')
    assert engine.load().waiting == 0


def test_what_nobody_reads_is_bounded() -> None:
    engine = scene.engine()
    engine._first_seconds.extend([0.0] * (2**16 + 5))
    assert len(engine.load().first_token_seconds) == 2**16
    assert engine.load().first_token_seconds == ()
