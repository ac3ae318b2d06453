"""Validated steps in a stage's folder: what is kept, what is chosen, and files that were changed."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from simrl.experiments.candidates import Candidates
from simrl.rl.validation import ValidationSettings
from simrl.run.stage_files import WorkdirError

SETTINGS = ValidationSettings(every=10, examples=3)
IDS = ['a', 'b', 'c']
REWARDS = {0: [5.0, 5.0, 5.0], 10: [0.0, 0.1, 0.0], 20: [1.0, 1.1, 1.2], 30: [1.0, np.nan, 1.2]}


def params(step: int):
    return {'decoder': {'head': jnp.full(4, float(step))}}


def recorded(folder, steps=tuple(REWARDS)) -> Candidates:
    candidates = Candidates(folder, SETTINGS, IDS)
    for step in steps:
        candidates.record(step, np.array(REWARDS[step], np.float32), params(step))
    return candidates


def test_only_steps_that_may_be_chosen_are_kept_and_the_initial_assistant_is_none(tmp_path):
    candidates = recorded(tmp_path)
    assert sorted(path.name for path in (tmp_path / 'candidates').iterdir()) == ['20', '30']
    assert candidates.chosen() == 20
    assert candidates.params(20, params(0))['decoder']['head'].tolist() == [20.0] * 4
    summary = candidates.summary()
    assert summary['step'] == [0, 10, 20, 30]
    assert summary['reward'] == pytest.approx([5.0, 0.1 / 3, 1.1, 1.1])
    assert summary['chosen'] == 20
    assert (summary['judged'], summary['examples']) == ([3, 3, 3, 2], 3)


@pytest.mark.parametrize('stopped_after', [0, 10, 20])
def test_a_training_that_goes_on_from_an_earlier_step_chooses_the_same(tmp_path, stopped_after):
    """After a kill steps are validated again, with the results of later ones there already."""
    whole = recorded(tmp_path / 'whole').summary()
    recorded(tmp_path / 'killed')
    again = recorded(tmp_path / 'killed', [step for step in REWARDS if step > stopped_after])
    assert again.summary() == whole
    assert again.params(20, params(0))['decoder']['head'].tolist() == [20.0] * 4


@pytest.mark.parametrize(
    'content', ['{"rewards": {"a": 1.0}}', '{"rewards"', '[]', '{"rewards": {"a": "x", "b": 1, "c": 2}}']
)
def test_files_that_were_changed_are_named(tmp_path, content):
    recorded(tmp_path)
    path = tmp_path / 'validation' / 'step-10.json'
    path.write_text(content)
    with pytest.raises(WorkdirError, match=f'^{re.escape(str(path))}: expected the rewards of 3 validation examples'):
        Candidates(tmp_path, SETTINGS, IDS)


def test_a_conversation_without_a_reward_is_null_in_the_file(tmp_path):
    recorded(tmp_path)
    found = json.loads((tmp_path / 'validation' / 'step-30.json').read_text())
    assert found == {'step': 30, 'rewards': {'a': 1.0, 'b': None, 'c': pytest.approx(1.2)}}
