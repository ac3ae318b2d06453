"""TensorBoard knows a training's arm and seed; a result needs the lines that it is made of, and most of the scores."""

import json
import pathlib
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from configs import quickstart
from simrl.conversations.chat import TERMINAL_TEXT
from simrl.conversations.records import Example
from simrl.evaluation.outcomes import outcomes_of
from simrl.experiments import experiment, replies, work
from simrl.experiments.outputs import lines_at, save_result
from simrl.experiments.replies import outcome_columns
from simrl.experiments.settings import Compute, EvaluationSettings, MeshSettings
from simrl.remote.answers import TRIED_AGAIN, Cause, Failure, reason_of
from simrl.rewards.panel import verdict_of
from simrl.rewards.rewards import CAUSES, JUDGE_FAILED, Judging, Rewards
from simrl.rl import judged
from simrl.rollouts.agents import HostAgent
from simrl.rollouts.collect import ConversationError
from simrl.rollouts.state import EndReason
from simrl.run.stage_files import WorkdirError
from simrl.training.loop import LoopSettings


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


FAILED = {'e1': 'a judge failed: judge a: invalid_json', 'e4': 'no line'}


def test_no_two_uses_draw_the_same_numbers():
    source = '\n'.join(path.read_text() for path in pathlib.Path(work.__file__).parents[1].rglob('*.py'))
    found = re.findall(r'^(\w+_STEP) = 2\*\*31 - (\d+)', source, re.MULTILINE)
    assert {'MATRIX_STEP', 'REPLAY_STEP', 'VALIDATION_STEP'} < dict(found).keys()
    assert len(set(dict(found).values())) == len(found)


def measured(monkeypatch, failed: Mapping[str, str], examples: int = 5, max_unjudged: float = 0.5) -> dict[str, Any]:
    """A measure of conversations in batches of 3, of which a judge fails those of even numbers, the user the others."""
    of = [Example(f'e{i}', f'hi {i // 2}', None, i, 'test', 'test') for i in range(examples)]
    compute = Compute(mesh=MeshSettings(data=1), loop=LoopSettings(max_unjudged=max_unjudged))

    def collect(user, assistant, chosen, *, padding, on_piece, **_):
        rows = len(chosen) + padding
        failures = {row: failed[x.id] for row, x in enumerate(chosen) if failed.get(x.id) == 'no line'}
        ends = np.array([EndReason.FAILURE if row in failures else EndReason.TURNS for row in range(rows)])
        batch = SimpleNamespace(end_reason=ends, resamples=np.arange(rows), length=np.ones(rows, int))
        on_piece(batch, [*chosen, *[chosen[-1]] * padding])
        return batch, failures

    def start(_, chosen):
        reasons = {row: failed[x.id] for row, x in enumerate(chosen) if x.id in failed}
        valid = np.array([row not in reasons for row in range(len(chosen))])
        value = np.array([int(x.id[1:]) / 10 for x in chosen], np.float32)
        parts = {'judge_a': value * 2, 'share': value}
        return lambda: (
            Rewards(value, valid, parts, np.where(valid, 0, CAUSES.index(JUDGE_FAILED)).astype('i4')),
            reasons,
        )

    def transcripts(batch, _):
        said = [{'user': 'bye' + TERMINAL_TEXT * (row == 2), 'assistant': 'hi'} for row in range(len(batch.end_reason))]
        return [
            {
                'messages': [{'role': role, 'content': x, 'tokens': 1, 'truncated': False} for role, x in one.items()],
                'end_reason': 'turns',
            }
            for one in said
        ]

    monkeypatch.setattr(judged, 'collect', collect)
    monkeypatch.setattr(replies, 'transcripts', transcripts)
    monkeypatch.setattr(replies, 'check_agents', mock.Mock())
    monkeypatch.setattr(replies, 'judged_programs', lambda *_, **__: {})
    scene = mock.Mock(compute=compute, settings=mock.Mock(evaluation=EvaluationSettings(batch_size=3)))
    scene.outcomes = lambda _, rows, scores: (
        outcome_columns(rows, scores) | {'act': ['ask'] * len(rows)},
        {'talks': len(rows)},
    )
    scene.shown = lambda example, _: {'example': example.id}
    agent = HostAgent(mock.Mock(), 1)
    return work.conversations_with(agent, agent, of, scene, Judging(start), name='people', step=0, shown=2)


def test_a_conversation_without_a_score_is_masked_with_its_cause(monkeypatch, capsys) -> None:
    """Its place stays, so that assistants are compared on the same examples; padding counts for nothing."""
    found = measured(monkeypatch, FAILED)
    columns = found['outcomes']
    assert columns['example'] == ['e0', 'e1', 'e2', 'e3', 'e4']
    assert columns['cluster'] == ['hi 0', 'hi 0', 'hi 1', 'hi 1', 'hi 2']
    assert columns['cause'] == ['', FAILED['e1'], '', '', FAILED['e4']]
    assert columns['score'] == [0.0, None, pytest.approx(0.2), pytest.approx(0.3), None]
    assert columns['judge_a'] == [0.0, None, pytest.approx(0.4), pytest.approx(0.6), None], 'of a panel each judge'
    assert 'share' not in columns, 'other parts are the scene’s'
    assert columns['end'] == ['turns', None, 'turns', 'turns', None]
    assert columns['act'] == ['ask', None, 'ask', 'ask', None]
    of_users = {'resampled': 0 + 2 + 0, 'repeated': 0, 'later_messages': 0, 'missed_signals': 1}
    assert found['statistics'] == {'talks': 3} | of_users
    assert found['shown'] == [{'example': 'e0'}], 'the first two examples, without the one that failed'
    assert outcomes_of('initial', columns).judged.tolist() == [True, False, True, True, False]
    printed = capsys.readouterr().out
    for cause in FAILED.values():
        assert f'people: 1 conversations have no reward: {cause}' in printed
    whole = measured(monkeypatch, {})
    assert set(whole['outcomes']['cause']) == {''}
    assert np.float32(whole['outcomes']['score']).tolist() == (np.arange(5, dtype=np.float32) / 10).tolist()


@pytest.mark.parametrize(('max_unjudged', 'found'), [(0.4, '2 of 5'), (0.2, '1 of 5')])
def test_a_measure_in_which_too_many_failed_is_not_done(monkeypatch, max_unjudged: float, found: str) -> None:
    with pytest.raises(
        ConversationError,
        match=rf'^people: {found} conversations have no reward \(config.compute.loop.max_unjudged={max_unjudged}\): ',
    ):
        measured(monkeypatch, FAILED, max_unjudged=max_unjudged)


@pytest.mark.parametrize('cause', TRIED_AGAIN)
def test_a_measure_whose_endpoints_were_down_is_not_done(monkeypatch, cause: Cause) -> None:
    """Its result would be of the conversations that came before or after: the same command asks for the others."""
    failure = Failure(cause, 'tries: 3, 12.5 s')
    for reason in (reason_of(failure), str(verdict_of({'a': failure}).detail)):
        with pytest.raises(
            ConversationError, match=rf'1 conversations have no score: .*{cause} for now \(1\)\. Answers'
        ):
            measured(monkeypatch, FAILED | {'e2': reason})


def test_a_measure_in_which_all_failed_is_never_done(monkeypatch) -> None:
    with pytest.raises(ConversationError, match=r'^people: 2 of 2 .*max_unjudged=1\): no line'):
        measured(monkeypatch, {'e0': 'no line', 'e1': 'no line'}, examples=2, max_unjudged=1.0)


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
