"""TensorBoard knows a training's arm and seed; a result needs all the lines, and all the scores, that it is made of."""

import json
import pathlib
from typing import Any
from unittest import mock

import jax
import pytest

from configs import quickstart
from simrl.conversations.records import Example
from simrl.experiments import experiment, work
from simrl.experiments.outputs import lines_at, save_result
from simrl.models import sharding
from simrl.rollouts import collect
from simrl.rollouts.agents import HostAgent
from simrl.rollouts.collect import ConversationError
from simrl.run.stage_files import WorkdirError


class _Started(Exception):  # noqa: N818  (no error: what the training was given)
    pass


def test_arm_and_seed_are_hyperparameters_of_a_training(tmp_path: pathlib.Path, monkeypatch) -> None:
    def train(folder: pathlib.Path, *, hyperparameters: dict[str, Any], **_: Any) -> None:
        raise _Started(hyperparameters)

    monkeypatch.setattr(work.rl, 'train', train)
    monkeypatch.setattr(work, 'fitting_simulator', mock.Mock())
    settings = experiment.settings_of(quickstart.get_config('smoke'))
    scene = mock.Mock(settings=settings, compute=settings.compute, assistant_stage=None)
    scene.training_examples.return_value = []
    with pytest.raises(_Started) as started:
        work.train_arm(tmp_path, scene=scene, arm='persona', seed=3)
    (found,) = started.value.args
    assert (found['arm'], found['seed']) == ('persona', 3)
    assert found['algorithm']['advantage'] == settings.rl.algorithm.advantage


def test_a_training_without_a_gradient_is_not_done() -> None:
    nothing = {
        'grad_norm': None,
        'trained_tokens': 0.0,
        'skipped': 0.0,
    }  # a simulator that ends every conversation at once
    alike = {'grad_norm': 0.0, 'trained_tokens': 90.0, 'skipped': 0.0}  # a reward that is the same for all
    broken = {'grad_norm': None, 'trained_tokens': 90.0, 'skipped': 0.5}  # gradients of NaN
    for lines, found in (
        ([nothing] * 2, 'no conversation with a reward has a message'),
        ([nothing, alike], 'rewards n'),
        ([alike, broken], 'updates were skipped, whose loss or gradients were not finite'),
    ):
        with pytest.raises(ConversationError, match=f'^config.arms.mine: .* no gradient in any step: {found}'):
            work.check_learned('config.arms.mine', lines)
    work.check_learned('config.arms.mine', [broken, alike, alike | {'grad_norm': 1e-3}])


@pytest.mark.parametrize('score', [float('nan'), float('inf')])
def test_a_measure_with_a_score_that_is_not_finite_is_not_done(tmp_path: pathlib.Path, score: float) -> None:
    outcomes = {'example': ['a', 'b'], 'score': [0.5, score]}
    measure = mock.Mock(run=lambda *_: {'outcomes': outcomes, 'statistics': {}, 'shown': []})
    with pytest.raises(ConversationError, match=rf'^example b: expected a finite score, found {score}$'):
        work.measure_assistant(tmp_path, scene=mock.Mock(), measure=measure, stage=None, numbers=None, shown=0)
    assert not any(tmp_path.iterdir())


def test_a_measure_in_which_conversations_failed_is_not_done(monkeypatch) -> None:
    """None of them is left out: assistants are compared on the same examples."""
    examples = [Example(f'person-{i}', None, None, i, 'test', 'test') for i in range(3)]
    monkeypatch.setattr(collect, 'check_agents', mock.Mock())
    monkeypatch.setattr(collect, 'collect', lambda *_, **__: (None, {1: 'no line'}))
    agent, mesh = HostAgent(mock.Mock(), 1), sharding.make_mesh(1, 1, jax.devices()[:1])
    batches = collect.collect_batches(
        agent,
        agent,
        examples,
        chat=mock.Mock(),
        limits=mock.Mock(),
        seed=0,
        step=0,
        batch_size=3,
        mesh=mesh,
        name='people',
    )
    with pytest.raises(
        ConversationError, match=r'^people: 1 of 3 conversations failed, the first, with example person-1: no line$'
    ):
        next(batches)


def test_a_full_disk_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'result.json').symlink_to('/dev/full')
    with pytest.raises(
        OSError, match=rf'^\[Errno 28\] could not write {tmp_path}/result\.json: No space left on device$'
    ):
        save_result(tmp_path, {})


def test_a_missing_line_is_named(tmp_path: pathlib.Path) -> None:
    lines = [{'step': step, 'held_out/loss': 1.0 / (step + 1)} for step in (0, 5, 10)]
    (tmp_path / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    assert lines_at(tmp_path, (0, 10)) == [lines[0], lines[2]]
    with pytest.raises(WorkdirError, match=rf'metrics\.jsonl: expected a line of step 20, .*Delete {tmp_path} to'):
        lines_at(tmp_path, (0, 20))
