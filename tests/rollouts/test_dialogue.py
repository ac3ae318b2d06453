"""Whole conversations: what both models see, what is recorded, and what nothing else may change."""

import dataclasses
import functools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT, PAD, TEMPLATE, USER
from simrl.models import transformer
from simrl.models.cache import Cache, empty_cache, extended
from simrl.models.log_probs import token_log_probs
from simrl.rollouts import context
from simrl.rollouts.compaction import gather_rows
from simrl.rollouts.context import Context, cache_capacities, extend, grow_cache, prefill
from simrl.rollouts.dialogue import add_message, capacity, grow_caches
from simrl.rollouts.messages import room_to_receive, room_to_send, send
from simrl.rollouts.state import Dialogue, EndReason, example_hash, row_keys
from simrl.rollouts.trajectories import missed_signals, rollout_metrics, trajectories, transcripts
from tests import many_devices
from tests.rollouts import scene, slow

ALL = list(range(scene.ROWS))
VIEWS = ('user', 'assistant')
_apply = jax.jit(transformer.apply, static_argnums=(1, 2))
_token_log_probs = jax.jit(token_log_probs)
EOT = (scene.EOT_USER, scene.EOT_ASSISTANT)


def _roll(dialogue: Dialogue, keys: jax.Array, turns: int = scene.TURNS) -> Dialogue:
    return scene.converse(*scene.policies(), dialogue, keys, turns=turns)


@functools.cache
def _whole() -> Dialogue:
    """The conversations of the scene."""
    return _roll(scene.start(ALL), scene.keys())


@functools.cache
def _host() -> Dialogue:
    return scene.without_caches(_whole())


@functools.cache
def _slow() -> list[slow.Conversation]:
    return slow.converse_all(scene, ALL)


def _views(dialogue: Dialogue, row: int) -> list[Context]:
    """Both contexts of a row, cut to its length."""
    views = []
    for name in VIEWS:
        view = getattr(dialogue, name)
        length = int(view.length[row])
        cut = {f: np.asarray(getattr(view, f))[row, :length] for f in ('tokens', 'role', 'message', 'log_prob')}
        views.append(dataclasses.replace(view, **cut))
    return views


def _assert_same_conversation(dialogue: Dialogue, row: int, other: Dialogue, other_row: int) -> None:
    for field in ('num_messages', 'message_length', 'truncated', 'end_reason', 'messages', 'decoded_steps'):
        a, b = np.asarray(getattr(dialogue, field))[row], np.asarray(getattr(other, field))[other_row]
        assert np.array_equal(a, b), field
    for mine, theirs in zip(_views(dialogue, row), _views(other, other_row), strict=True):
        assert np.array_equal(mine.tokens, theirs.tokens)
        assert np.array_equal(mine.role, theirs.role)
        assert np.array_equal(mine.message, theirs.message)
        np.testing.assert_allclose(mine.log_prob, theirs.log_prob, atol=2e-5)


# Messages.


def test_equals_plain_python_token_by_token_without_a_cache() -> None:
    dialogue = _host()
    for row, expected in enumerate(_slow()):
        count = int(dialogue.num_messages[row])
        messages = [dialogue.messages[row, i, : dialogue.message_length[row, i]].tolist() for i in range(count)]
        assert messages == expected.messages
        assert dialogue.truncated[row, :count].tolist() == expected.truncated
        assert EndReason(dialogue.end_reason[row]).name.lower() == expected.end
        assert dialogue.decoded_steps[row] == expected.steps
        for view, slow_view in zip(_views(dialogue, row), expected.views, strict=True):
            assert view.tokens.tolist() == [entry.token for entry in slow_view]
            assert view.role.tolist() == [entry.role for entry in slow_view]
            assert view.message.tolist() == [entry.message for entry in slow_view]
            np.testing.assert_allclose(view.log_prob, [entry.log_prob for entry in slow_view], atol=2e-5)


def test_the_scene_holds_every_case() -> None:
    """Without them the other tests here would prove less."""
    talks = _slow()
    stops = [talk.stop for talk in talks]
    assert (scene.TERMINAL,) in stops
    assert scene.TRIPLE_STOP in stops
    assert any(stop in scene.PAIR_STOPS for stop in stops)
    assert any(talk.end == 'turns' for talk in talks)
    assert {True, False} == {cut for talk in talks for cut in talk.truncated}
    assert any(not message for talk in talks for message in talk.messages)
    lengths = {len(talk.messages) for talk in talks}
    assert 1 in lengths
    assert 2 * scene.TURNS in lengths


def test_sampler_log_prob_is_the_teacher_forced_one() -> None:
    dialogue = _host()
    for side, name in enumerate(VIEWS):
        view, spec = getattr(dialogue, name), scene.SPECS[side]
        hidden, _ = _apply(scene.policies()[side].params, spec.config, spec.execution, view.tokens)
        temperature = scene.TEMPERATURES[side]
        sampled = (view.role == spec.role) & (view.message >= dialogue.num_given[:, None])
        log_prob, _ = _token_log_probs(
            scene.policies()[side].params,
            hidden[:, :-1],
            view.tokens[:, 1:],
            sampled[:, 1:],
            scene.TOKEN_MASKS[side],
            temperature,
        )
        assert sampled.sum() > 30
        np.testing.assert_allclose(view.log_prob[:, 1:][sampled[:, 1:]], log_prob[sampled[:, 1:]], atol=2e-5)
        assert np.all(view.log_prob[~sampled] == 0)


# What both views hold.


def test_both_views_hold_the_same_messages() -> None:
    dialogue = _host()
    for row in ALL:
        reason = dialogue.end_reason[row]
        for number in range(dialogue.num_messages[row]):
            ids = dialogue.messages[row, number, : dialogue.message_length[row, number]].tolist()
            sender = (USER, ASSISTANT)[number % 2]
            for side, view in enumerate(_views(dialogue, row)):
                here = view.message == number
                tokens = view.tokens[here & ((view.role == sender) | np.isin(view.tokens, EOT))].tolist()
                silent = reason == EndReason.SIGNAL and number == dialogue.num_messages[row] - 1
                if silent:
                    assert tokens == (ids if side == number % 2 else [])
                elif number < dialogue.num_given[row] and side == 0 and row not in scene.IN_BOTH_VIEWS:
                    assert tokens == []
                else:
                    # Each view ends the message in its own way.
                    spec = scene.SPECS[side]
                    end = spec.end_of_turn if side == number % 2 else spec.partner_end_of_turn
                    assert tokens == [*ids, end]


def test_roles_past_the_length_are_0_and_nowhere_else() -> None:
    for name in VIEWS:
        view = getattr(_host(), name)
        past = np.arange(view.tokens.shape[1]) >= view.length[:, None]
        assert np.array_equal(view.role == PAD, past)
        assert np.all(view.tokens[past] == 0)


@pytest.mark.parametrize('role', [USER, ASSISTANT])
def test_trained_tokens_are_those_that_the_role_sampled(role: int) -> None:
    side = role - USER
    rows = jax.device_get(trajectories(_host(), role, np.arange(scene.ROWS), np.arange(scene.ROWS)))  # type: ignore[arg-type]
    for row, talk in enumerate(_slow()):
        given = 1 if row in scene.OPENINGS else 0
        expected = [entry.role == role and entry.message >= given for entry in talk.views[side]]
        trained = rows.role[row] == role
        assert trained[: len(expected)].tolist() == expected
        assert not trained[len(expected) :].any()
        turns = np.where(expected, [entry.message // 2 for entry in talk.views[side]], -1)
        assert np.array_equal(rows.turn[row, : len(expected)], turns)
        assert np.all(rows.turn[row, len(expected) :] == -1)
    if role == USER:  # given openings are there to be left out
        assert np.any((_host().user.role == USER) & (rows.role == TEMPLATE))


def test_a_forced_end_of_turn_is_template_in_both_views_and_a_sampled_one_is_not() -> None:
    dialogue = _host()
    forced = sampled = 0
    for row in ALL:
        for view in _views(dialogue, row):
            for at in np.flatnonzero(np.isin(view.tokens, EOT)):
                number = view.message[at]
                cut = bool(dialogue.truncated[row, number])
                assert view.role[at] == (TEMPLATE if cut else (USER, ASSISTANT)[number % 2])
                assert view.log_prob[at] == 0 or not cut
                forced, sampled = forced + cut, sampled + (not cut)
                if cut:
                    assert dialogue.message_length[row, number] == scene.SPECS[number % 2].max_new_tokens
    assert forced > 10
    assert sampled > 10


def test_a_signal_ends_the_message_where_a_search_of_the_record_finds_it() -> None:
    dialogue = _host()
    for row in ALL:
        for number in range(dialogue.num_messages[row]):
            ids = dialogue.messages[row, number, : dialogue.message_length[row, number]].tolist()
            ends = [
                at
                for at in range(1, len(ids) + 1)
                for run in scene.USER_SPEC.stop_sequences
                if tuple(ids[max(0, at - len(run)) : at]) == run
            ]
            last = number == dialogue.num_messages[row] - 1
            if number % 2 == 0 and number >= dialogue.num_given[row]:
                signalled = last and dialogue.end_reason[row] == EndReason.SIGNAL
                assert ends == ([len(ids)] if signalled else [])


# What must not matter.


def test_other_rows_do_not_matter() -> None:
    order = [5, 1, 7, 7, 0, 2, 6, 5]  # other neighbours, other places, some rows twice
    other = scene.without_caches(_roll(scene.start(order), scene.keys(order)))
    for place, row in enumerate(order):
        _assert_same_conversation(_host(), row, other, place)


@pytest.mark.long
def test_a_smaller_batch_with_more_room_does_not_matter() -> None:
    rows = [6, 3, 4]
    other = _roll(scene.start(rows, extra=24), scene.keys(rows))
    assert other.user.capacity == _host().user.capacity + 24
    for place, row in enumerate(rows):
        _assert_same_conversation(_host(), row, other, place)


def test_keys_matter() -> None:
    other = scene.without_caches(_roll(scene.start(ALL), scene.keys(range(50, 58))))
    assert not np.array_equal(other.messages[:, 2], _host().messages[:, 2])


@functools.cache
def _by_messages() -> list[Dialogue]:
    """The state after each message, from a Python loop over `add_message`."""
    dialogue = scene.start(ALL)
    states = []
    for number in range(2 * scene.TURNS):
        role = (USER, ASSISTANT)[number % 2]
        dialogue = add_message(*scene.policies(), dialogue, scene.keys(), role=role)
        states.append(jax.tree.map(jnp.copy, dialogue))  # the next message donates the other one
    return states


def test_a_loop_over_messages_is_the_conversation() -> None:
    for row in ALL:
        _assert_same_conversation(_host(), row, _by_messages()[-1], row)


def test_from_the_middle_with_repeated_rows() -> None:
    """The same keys go on as before, from between two messages too; other keys say something else from there on."""
    rows = [0, 0, 1, 1, 2, 2, 7, 7]
    keys = jax.random.wrap_key_data(
        np.where(
            (np.arange(8) % 2 == 0)[:, None],
            jax.random.key_data(scene.keys(rows)),
            jax.random.key_data(scene.keys(range(50, 58))),
        )
    )
    for number in (2, 3):
        middle = gather_rows(_by_messages()[number - 1], np.array(rows))
        other = scene.without_caches(_roll(middle, keys))
        for place, row in enumerate(rows):
            if place % 2 == 0:
                _assert_same_conversation(_host(), row, other, place)
            before = _by_messages()[number - 1].num_messages[row]
            assert np.array_equal(other.messages[place, :before], _host().messages[row, :before])
        assert not np.array_equal(other.messages[1::2], other.messages[::2])
        assert np.array_equal(other.num_given, _host().num_given[rows])  # what was sampled before is still trained on


@pytest.mark.long
def test_devices_do_not_matter() -> None:
    """Eight devices, two rows each and then one, say what one device says, and gather no cache to say it."""
    printed = many_devices.run('tests.rollouts.eight_devices')
    found = json.loads(printed.splitlines()[-1])
    rows = found['rows']
    assert found['messages'] == _host().messages[rows].tolist()
    assert found['user'] == _host().user.tokens[rows].tolist()
    assert found['assistant'] == _host().assistant.tokens[rows].tolist()
    both, one = found['active'][0], found['active'][-1]
    assert both[:3] == [2, 2, 2]
    assert [2 * x for x in one] == both
    assert Counter(found['compiled']) == {'jit(add_message)': 4, 'jit(gather_rows)': 3, 'jit(scatter_rows)': 1}
    # Rows stay on their devices. Each loop sends the number by which all end it together: two that feed and one that
    # decodes in a turn.
    number = [['all-reduce', []]]
    assert found['sent'] == {'gathering rows': [], 'prefill': number, 'message': 3 * number}


def test_repeated_calls_compile_once() -> None:
    _whole()
    before = add_message._cache_size()
    warmer = (dataclasses.replace(policy, temperature=policy.temperature + 0.5) for policy in scene.policies())
    scene.converse(*warmer, scene.start(ALL), scene.keys(range(3, 11)), turns=scene.TURNS)
    assert add_message._cache_size() == before


# Ends without a word, and contexts.


def test_a_row_without_room_ends_as_budget_and_writes_nothing() -> None:
    dialogue = scene.start(ALL)
    full = np.asarray(dialogue.user.length).copy()
    full[1] = dialogue.user.capacity - 2 - scene.USER_SPEC.max_new_tokens  # one token too few
    other = scene.without_caches(
        _roll(dataclasses.replace(dialogue, user=dataclasses.replace(dialogue.user, length=full)), scene.keys())
    )
    assert other.end_reason[1] == EndReason.BUDGET
    assert other.num_messages[1] == 0
    assert other.user.length[1] == full[1]
    _assert_same_conversation(_host(), 0, other, 0)


def test_a_row_without_a_prompt_ends_as_failure() -> None:
    dialogue = scene.start(ALL)
    views = {
        name: dataclasses.replace(view, length=np.asarray(view.length) * (np.arange(8) != 2))
        for name, view in (('user', dialogue.user), ('assistant', dialogue.assistant))
    }
    opening = np.full((8, 4), 9, np.int32)
    given = np.array([row in scene.OPENINGS for row in ALL])
    begun = scene._begin(views['user'], views['assistant'], opening, np.ones(8, np.int32), given)
    other = scene.without_caches(_roll(begun, scene.keys()))
    assert other.end_reason[2] == EndReason.FAILURE
    assert other.user.length[2] == 0
    _assert_same_conversation(_host(), 3, other, 3)


def test_caches_are_those_of_whole_prompts() -> None:
    """What was fed in pieces (prompts, headers, samples, the partner's messages) is there as if fed at once."""
    dialogue = _by_messages()[-1]
    for side, name in enumerate(VIEWS):
        view, spec = getattr(dialogue, name), scene.SPECS[side]
        empty = transformer.init_cache(spec.config, scene.ROWS, view.capacity, 'float32')
        _, cache = _apply(scene.policies()[side].params, spec.config, spec.execution, view.tokens, cache=empty)
        assert cache is not None
        fed = np.arange(view.capacity) < np.asarray(view.length)[:, None] - 1
        for mine, whole, at in (
            *((*pair, fed[:, None, None]) for pair in zip(view.cache.key, cache.key, strict=True)),
            *((*pair, fed[:, None, :, None]) for pair in zip(view.cache.value, cache.value, strict=True)),
        ):
            np.testing.assert_allclose(np.where(at, mine, 0), np.where(at, whole, 0), atol=1e-4)
            assert not np.any(np.where(at, 0, mine))  # the last token is pending, and nothing lies past it


def test_caches_that_grow_say_the_same() -> None:
    """From caches of the prompts alone, which get room before each message."""
    begun = scene.start(ALL, room=False)
    assert all(view.cache.capacity < view.capacity / 2 for view in (begun.user, begun.assistant))
    grown = scene.without_caches(_roll(begun, scene.keys()))
    found, expected = (dict(jax.tree_util.tree_leaves_with_path(x)) for x in (grown, _host()))
    for path, array in expected.items():
        name = jax.tree_util.keystr(path)
        assert (
            np.allclose(array, found[path], atol=2e-5)
            if name.endswith('log_prob')
            else np.array_equal(array, found[path])
        ), name


def test_caches_get_the_smallest_size_that_has_room() -> None:
    assert cache_capacities(100) == [64, 100]
    assert cache_capacities(700) == [64, 128, 256, 384, 512, 700]
    view = scene.context(0, ALL, room=False)
    assert grow_cache(view, view.cache.capacity) is view
    assert grow_cache(view, 33).cache.capacity == 33
    begun, user, assistant = scene.start(ALL, room=False), *scene.SPECS
    room = room_to_send(user)
    lengths = [32 - room, 64 - room_to_receive(assistant, user.max_new_tokens)]
    for more, expected in ((0, 64), (1, begun.user.capacity)):
        begun = grow_caches(*scene.policies(), begun, [lengths[0], lengths[1] + more], USER)
        assert begun.assistant.cache.capacity == min(expected, begun.assistant.capacity)
        assert begun.user.cache.capacity == min(expected, begun.user.capacity)


def test_a_cache_without_room_for_a_message_is_refused() -> None:
    view, spec = scene.context(0, ALL, room=False), dataclasses.replace(scene.USER_SPEC, max_new_tokens=14)
    zeros = jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match=r'Context\.cache: expected room for a message of 17 tokens, found 16'):
        send(dataclasses.replace(scene.policies()[0], spec=spec), view, scene.keys(), zeros, zeros == 0)


def test_extending_by_nothing_changes_nothing() -> None:
    view = scene.context(0, ALL)
    tokens, role = np.full((8, 3), 5, np.int32), np.full((8, 3), TEMPLATE, np.int8)
    count = np.array([0, 3, 1, 0, 2, 0, 0, 0], np.int32)
    message = np.zeros(8, np.int32)
    policy = scene.policies()[0]
    policy = dataclasses.replace(policy, spec=dataclasses.replace(policy.spec, feed_chunk=2))
    longer = jax.jit(extend)(policy, view, tokens, role, message, count)
    assert np.array_equal(longer.length, np.asarray(view.length) + count)
    for before, after in zip(jax.tree.leaves(view), jax.tree.leaves(longer), strict=True):
        same = np.flatnonzero(count == 0)
        assert np.array_equal(np.asarray(before)[same], np.asarray(after)[same])


# Keys, sizes, settings.


def test_row_keys_depend_on_seed_step_example_and_sample_only() -> None:
    example, sample = np.array([5, 9, 5], np.uint32), np.array([0, 0, 1], np.int32)
    data = np.asarray(jax.random.key_data(row_keys(1, 2, example, sample)))
    assert np.array_equal(data[::-1], jax.random.key_data(row_keys(1, 2, example[::-1], sample[::-1])))
    others = [row_keys(2, 2, example, sample), row_keys(1, 3, example, sample)]
    every = np.concatenate([data, *(np.asarray(jax.random.key_data(k)) for k in others)])
    assert len(np.unique(every, axis=0)) == len(every)


def test_example_hash_never_changes() -> None:
    assert example_hash('wildchat-1') == 2730271182
    assert 0 <= example_hash('') < 2**32


def test_capacity_is_what_the_longest_conversation_takes() -> None:
    spec = dataclasses.replace(scene.USER_SPEC, max_new_tokens=7)
    # Header 2, 7 tokens and a forced end; header 3, 5 tokens and a forced end.
    turns = 4 * ((2 + 7 + 1) + (3 + 5 + 1))
    for prompt, expected in ((96 - turns, 96), (97 - turns, 112)):
        assert capacity(spec, partner_max_new_tokens=5, prompt_length=prompt, turns=4) == expected
    with pytest.raises(
        ValueError, match=r'user: expected .* at most max_positions=256 tokens, found .* 257.*message 7'
    ):
        capacity(spec, partner_max_new_tokens=5, prompt_length=257 - turns, turns=4, name='user')
    assert capacity(spec, partner_max_new_tokens=5, prompt_length=256 - turns, turns=4) == 256
    fewer = dataclasses.replace(spec, config=dataclasses.replace(spec.config, max_positions=250))
    assert capacity(fewer, partner_max_new_tokens=5, prompt_length=250 - turns, turns=4) == 256
    with pytest.raises(ValueError, match=r'at most max_positions=250 tokens, found .* 251'):
        capacity(fewer, partner_max_new_tokens=5, prompt_length=251 - turns, turns=4)
    windowed = dataclasses.replace(spec, config=dataclasses.replace(spec.config, sliding_window=240))
    assert capacity(windowed, partner_max_new_tokens=5, prompt_length=240 - turns, turns=4) == 240
    with pytest.raises(ValueError, match=r'at most sliding_window=240 \(of max_positions=256\) tokens, found .* 241'):
        capacity(windowed, partner_max_new_tokens=5, prompt_length=241 - turns, turns=4)


def test_prompts_longer_than_the_capacity_are_refused() -> None:
    tokens = np.zeros((2, 9), np.int32)
    length = np.full(2, 9, np.int32)
    with pytest.raises(ValueError, match='at most capacity=8 tokens, found width 9'):
        prefill(scene.policies()[0], tokens, tokens, tokens, length, capacity=8)


def test_specs_that_cannot_be_are_refused() -> None:
    for change in ({'role': TEMPLATE}, {'max_new_tokens': 0}, {'stop_sequences': ((),)}, {'feed_chunk': 0}):
        with pytest.raises(ValueError, match=f'GenerationSpec.{next(iter(change))}: expected'):
            dataclasses.replace(scene.USER_SPEC, **change)  # type: ignore[arg-type]


# What is read out.


def test_transcripts_and_missed_signals() -> None:
    def decode(ids: list[int]) -> str:
        return ' '.join(map(str, ids))

    rows = transcripts(_whole(), decode)  # type: ignore[arg-type]
    json.dumps(rows)
    for row, talk in zip(rows, _slow(), strict=True):
        assert [message['content'] for message in row['messages']] == [decode(ids) for ids in talk.messages]
        assert [message['role'] for message in row['messages']] == ['user', 'assistant', *VIEWS * 2][
            : len(talk.messages)
        ]
        assert [message['truncated'] for message in row['messages']] == talk.truncated
        assert row['end_reason'] == talk.end
    stop_text = decode(list(scene.TRIPLE_STOP))
    assert missed_signals(rows, stop_text) == 0
    unseen = [{**row, 'end_reason': 'turns'} for row in rows]
    assert missed_signals(unseen, stop_text) == 1


def test_metrics_count_ends_cuts_and_useful_steps() -> None:
    metrics = {name: (float(a), float(b)) for name, (a, b) in rollout_metrics(_whole()).items()}
    talks = _slow()
    assert metrics['rollout/end_signal'] == (sum(talk.end == 'signal' for talk in talks), 8)
    user = [cut for talk in talks for cut in talk.truncated[::2]]
    assert metrics['rollout/truncated_user'] == (sum(user), len(user))
    useful, total = metrics['rollout/useful_steps']
    assert useful == sum(talk.steps for talk in talks)
    assert total % 8 == 0
    assert useful < total


def test_while_a_cache_grows_only_a_layer_of_it_exists_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the paper's simulator are a quarter of a device."""
    old = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), empty_cache(3, 2, 16, 2, 4, 'float32')
    )
    expected, deleted, extend_cache = jax.device_get(extended(old, 40)), list[int](), context.extend_cache

    def watched(layer: Cache, capacity: int) -> Cache:
        deleted.append(sum(x.is_deleted() for x in jax.tree.leaves(old)))
        assert len(layer.key) == 1
        return extend_cache(layer, capacity)

    monkeypatch.setattr(context, 'extend_cache', watched)
    larger = context.larger_cache(old, 40)
    assert deleted == [0, 2, 4]
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(larger), expected)
