"""Repeats of a user are sampled again: as plain Python does it, and with no effect on other rows."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from simrl.rollouts.agents import Resampling
from simrl.rollouts.repeats import Repeats
from simrl.rollouts.state import Dialogue, EndReason
from tests.rollouts import scene, slow
from tests.rollouts.test_dialogue import ALL, _assert_same_conversation, _views


def coarse(ids: Sequence[int]) -> str:
    """A text that many messages share, with outer space that must not count."""
    return ' ' * len(ids) + str(min(len(ids), 2))


RULE = Resampling(tries=3, temperature_step=0.15, max_temperature=1.2)
REPEATS = Repeats(RULE, scene.TEMPERATURES[0], coarse)


def rolled(rows: list[int], repeats: Repeats | None) -> Dialogue:
    dialogue = scene.converse(
        *scene.policies(), scene.start(rows), scene.keys(rows), turns=scene.TURNS, repeats=repeats
    )
    return scene.without_caches(dialogue)


@functools.cache
def whole() -> Dialogue:
    return rolled(ALL, REPEATS)


@functools.cache
def slow_talks() -> list[slow.Conversation]:
    return slow.converse_all(scene, ALL, REPEATS)


def test_equals_plain_python_that_writes_a_repeat_anew() -> None:
    dialogue = whole()
    for row, expected in enumerate(slow_talks()):
        count = int(dialogue.num_messages[row])
        messages = [dialogue.messages[row, i, : dialogue.message_length[row, i]].tolist() for i in range(count)]
        assert messages == expected.messages
        assert dialogue.truncated[row, :count].tolist() == expected.truncated
        assert EndReason(dialogue.end_reason[row]).name.lower() == expected.end
        assert dialogue.resamples[row] == expected.resamples
        assert dialogue.decoded_steps[row] == expected.steps
        for view, slow_view in zip(_views(dialogue, row), expected.views, strict=True):
            assert view.tokens.tolist() == [entry.token for entry in slow_view]
            assert view.role.tolist() == [entry.role for entry in slow_view]
            assert view.message.tolist() == [entry.message for entry in slow_view]
            np.testing.assert_allclose(view.log_prob, [entry.log_prob for entry in slow_view], atol=2e-5)


def test_the_scene_has_repeats_that_go_that_stay_and_that_never_were() -> None:
    resamples = [talk.resamples for talk in slow_talks()]
    left = [
        sum(
            coarse(talk.messages[number]).strip() == coarse(talk.messages[number - 2]).strip()
            for number in range(2, len(talk.messages) - (talk.end == 'signal'), 2)
        )
        for talk in slow_talks()
    ]
    assert 0 in resamples
    assert any(left)
    assert sum(resamples) > RULE.tries * sum(left), 'some repeats are gone after a few tries'


def test_nothing_is_left_after_the_last_token_of_a_row() -> None:
    dialogue = whole()
    for view in (dialogue.user, dialogue.assistant):
        assert view is not None
        after = np.arange(view.tokens.shape[1]) >= view.length[:, None]
        for name in ('tokens', 'role', 'message', 'log_prob'):
            assert not np.any(np.asarray(getattr(view, name))[after]), name


@pytest.mark.long
def test_batch_mates_do_not_matter() -> None:
    for rows in ([5, 1, 7], [3]):
        dialogue = rolled(rows, REPEATS)
        for place, row in enumerate(rows):
            _assert_same_conversation(dialogue, place, whole(), row)
            assert dialogue.resamples[place] == whole().resamples[row]


def test_conversations_without_repeats_are_as_they_were() -> None:
    plain, distinct = rolled(ALL, None), rolled(ALL, Repeats(RULE, 1.1, lambda ids: str(list(ids) or object())))
    jax.tree.map(np.testing.assert_array_equal, plain, distinct)
    for row in ALL:
        if whole().resamples[row] == 0:
            _assert_same_conversation(whole(), row, plain, row)


def test_temperatures_rise_to_their_end() -> None:
    rule = Resampling()
    assert [rule.temperature(0.7, attempt) for attempt in range(1, 6)] == pytest.approx([0.75, 0.8, 0.85, 0.9, 0.95])
    assert rule.temperature(0.98, 1) == 1.0
    assert rule.temperature(1.3, 2) == 1.3


@pytest.mark.parametrize(('field', 'value'), [('tries', 0), ('temperature_step', -0.1), ('max_temperature', -1.0)])
def test_bad_rules(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf'Resampling\.{field}: expected at least'):
        Resampling(**{field: value})
