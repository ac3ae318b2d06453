"""The programs of an RL stage on a tiny pretrained model, with a reward model as its reward: those that it states."""

import collections
import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest

from simrl.experiments import experiment, work
from simrl.rl import train as rl
from simrl.run.compiles import compilations
from simrl.training import loop
from tests.experiments import sides
from tests.experiments.test_pretrained import config_of, files  # noqa: F401  (a fixture)

STEPS = 3
KINDS = {
    'conversations': (None, {'start_dialogue', 'add_message', 'trajectories', 'score_part', 'zero_gradients'}),
    'futures': ({'samples': 1, 'turns': 1}, {'add_message', 'add_recorded', 'end_running', 'score_part'}),
    'openings': (None, {'start_dialogue', 'add_message', 'extend_cache', 'score_part'}),
}


@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_a_stage_compiles_what_it_states_before_its_first_step(
    kind: str,
    files: pathlib.Path,  # noqa: F811
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    futures, expected = KINDS[kind]
    config = config_of(files)
    with config.unlocked(), config.ignore_type():
        config.compute.compile_threads = 2
        config.rl.steps, config.rl.row_buckets, config.rl.algorithm.microbatches = STEPS, (96, 128), 2
        if kind == 'openings':
            config.arms[sides.ARM].update(
                {'simulator': 'role_play', 'opening': 'written', 'instructions': 'Play {person}. End with {signal}.'}
            )
        config.reward.update({} if futures is None else {'unit': 'future', 'futures': futures})
    scene = experiment.scene_of(experiment.settings_of(config), tmp_path)
    sides.prepare(scene)
    begun: list[int] = []

    def begins(run: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        begun.append(len(programs))
        return run(*args, **settings)

    for module, name in ((rl, 'train'), (loop, 'run')):
        monkeypatch.setattr(module, name, functools.partial(begins, getattr(module, name)))
    jax.clear_caches()  # what other tests compiled
    folder = tmp_path / 'rl' / sides.ARM / 'seed-0'
    with compilations() as programs:
        work.train_arm(folder, scene=scene, arm=sides.ARM, seed=0)
    said = capsys.readouterr().out
    found = re.search(r'^rl: at most \d+ programs that differ in their sizes: (.*)$', said, re.MULTILINE)
    assert found is not None
    bound = {name: int(number) for name, number in (each.split() for each in found[1].split(', '))}
    ahead, later = (
        collections.Counter(program.name for program in part)
        for part in (programs[begun[0] : begun[1]], programs[begun[1] :])
    )
    assert expected <= ahead.keys() & bound.keys()
    assert ahead['score_part'] == bound['score_part'] > 1
    for name, number in bound.items():
        assert ahead[name] + later[name] <= number, name
    # Nothing that was compiled ahead is compiled again, and nothing at all after the first step.
    assert not ahead.keys() & later.keys() & bound.keys()
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['time/programs'] for line in lines if line.get('time/programs') is not None][1:] == [0] * (STEPS - 1)
    assert 'rl: step 2: ' not in said
