"""The plan of an experiment: equal arms, growth without repetition, and what cannot be."""

import math
import pathlib

import pytest

from simrl.experiments import experiment, results
from simrl.experiments.experiment import build_stages, scene_of
from simrl.run import stages as stages_lib
from simrl.run.config import ConfigError, to_dict
from simrl.run.stages import Stage, WorkdirError
from tests.experiments.made_run import made_run, undo
from tests.experiments.scene import (
    CONCIERGE_ARMS,
    arms,
    fields_without_effect,
    identity,
    settings,
    tiny_settings,
    without_effect,
)

WORKDIR = pathlib.Path('run')


def stages(**changes) -> dict[str, Stage]:
    return {stage.name: stage for stage in build_stages(settings(**changes), WORKDIR)}


def test_every_stage_comes_after_what_it_reads():
    seen: set[pathlib.Path] = set()
    for name, stage in stages(name='concierge', arg='').items():
        assert set(stage.inputs.values()) <= seen, name
        seen.add(WORKDIR / name)


@pytest.mark.parametrize(
    ('before', 'after', 'new'),
    [
        ({'arms': arms('role_play')}, {'arms': arms('role_play', 'oracle')}, 'oracle'),
        ({'seeds': (0,)}, {'seeds': (0, 1)}, 'seed-1'),
        ({'seeds': (0,)}, {'seeds': (1, 0)}, 'seed-1'),
        ({'evaluation__people': 64}, {'evaluation__people': 192}, 'block-'),
        ({'arms': arms('role_play')}, {'arms': arms('role_play', 'persona')}, 'persona'),
    ],
)
def test_an_addition_computes_only_what_is_new(before, after, new):
    first, second = stages(**before), stages(**after)
    assert first.keys() < second.keys()
    assert all(identity(stage) == identity(second[name]) for name, stage in first.items())
    assert all(new in name for name in second.keys() - first.keys())


def test_a_stage_knows_every_setting_that_it_depends_on():
    """But for those that are declared to change no result beyond rounding."""
    forecast, mesh = {'examples': 8, 'samples': 8, 'n': 2}, {'data': 2, 'model': 1}
    found = settings(evaluation__forecast=forecast, evaluation__replayed=2, compute__simulator_mesh=mesh)
    without, skipped = fields_without_effect(to_dict(found))
    declared = without_effect(found)
    assert without - declared == {'arms.oracle.size'}  # people have no model
    assert declared <= without | skipped
    assert declared >= {
        'evaluation.batch_size',
        'rl.algorithm.microbatches',
        'rl.row_buckets',
        'compute.loop.log_every',
        'compute.simulator_mesh.model',
    }
    assert {'compute.training.dtype', 'rl.algorithm.minibatches', 'evaluation.shown'}.isdisjoint(declared)
    assert len(skipped) <= 19


def test_arms_differ_in_their_simulator_alone():
    listed = stages(seeds=(0, 1))
    for seed in (0, 1):
        found = [dict(to_dict(listed[f'rl/{arm}/seed-{seed}'].settings)) for arm in CONCIERGE_ARMS]
        assert len({part.pop('simulator') for part in found}) == len(found)
        told = [part.pop('told', None) for part in found]
        assert len(set(told)) == len(told)
        assert all(part == found[0] for part in found)
    both = [dict(to_dict(listed[f'rl/persona/seed-{seed}'].settings)) for seed in (0, 1)]
    assert [part.pop('seed') for part in both] == [0, 1]
    assert both[0] == both[1]


def test_a_fine_tuned_simulator_is_trained_anew_for_each_seed():
    listed = stages(seeds=(0, 3))
    for seed in (0, 3):
        assert listed[f'rl/fine_tuned/seed-{seed}'].inputs['simulator'] == WORKDIR / f'sft/fine_tuned/seed-{seed}'
        assert listed[f'rl/role_play/seed-{seed}'].inputs['simulator'] == WORKDIR / 'sft/base_user'
    assert 'simulator' not in listed['rl/oracle/seed-0'].inputs


def test_seeds_may_be_run_one_by_one_and_an_assistant_meets_the_simulators_of_its_own():
    together, apart = stages(seeds=(3, 0)), {**stages(seeds=(0,)), **stages(seeds=(3,))}
    assert {name: identity(stage) for name, stage in together.items()} == {
        name: identity(stage) for name, stage in apart.items()
    }
    matrix = [name.split('/', 1)[1] for name in together if name.startswith('matrix/')]
    met = {name for name in matrix if name.startswith('oracle/seed-3/')}
    assert met == {f'oracle/seed-3/{user}' for user in ('role_play', 'persona', 'fine_tuned/seed-3')}
    met = {name for name in matrix if name.startswith('initial/')}
    assert met == {f'initial/{user}' for user in ('role_play', 'persona', 'fine_tuned/seed-3', 'fine_tuned/seed-0')}
    for seed in (0, 3):
        for stage in (f'matrix/oracle/seed-{seed}/fine_tuned/seed-{seed}', f'likelihood/fine_tuned/seed-{seed}'):
            assert together[stage].inputs['simulator'] == WORKDIR / f'sft/fine_tuned/seed-{seed}'


def test_a_held_out_simulator_trains_no_assistant_and_meets_all_of_them():
    """It changes no other stage: an arm of a finished run may be held out, and a held-out one added."""
    held_out, alone = stages(held_out_simulators=('fine_tuned',), seeds=(0, 3)), stages(seeds=(0, 3))
    without = {name for name in alone if '/fine_tuned/' in f'{name}/' and name.startswith(('rl/', 'people/'))}
    without |= {name for name in alone if name.startswith('matrix/fine_tuned/')}
    assert len(without) == 2 * (1 + 1 + 3), 'by seed: a training, a block of people, a cell for each simulator'
    assert held_out.keys() == alone.keys() - without
    assert all(identity(stage) == identity(alone[name]) for name, stage in held_out.items())
    assert {'matrix/persona/seed-3/fine_tuned/seed-3', 'likelihood/fine_tuned/seed-0'} <= held_out.keys()
    spec = experiment.results_spec(scene_of(settings(held_out_simulators=('fine_tuned',)), WORKDIR))
    assert [name for name, arm in spec.arms.items() if arm.held_out] == ['fine_tuned']
    assert list(spec.runs) == ['role_play', 'persona', 'oracle']


@pytest.mark.parametrize(
    ('field', 'refused'),
    [('logs', 'logs'), ('vocabulary', 'world'), ('assistant', 'world'), ('base_user', 'world')],
)
def test_other_text_changes_the_stage_that_makes_it_alone(field, refused):
    before, after = stages(), stages(**{f'corpora__{field}': 300})
    assert [name for name, stage in before.items() if identity(stage) != identity(after[name])] == [refused]


def two_names(simulator: str, seeds: tuple[int, ...]) -> experiment.ExperimentSettings:
    """Two arms that are equal but for their names."""
    return tiny_settings({name: {'simulator': simulator} for name in (simulator, f'{simulator}-copy')}, seeds=seeds)


@pytest.mark.long
def test_one_simulator_under_two_names_gives_the_same_bytes(tmp_path):
    """A control of the instrument: arms that are equal but for their names are one arm, to the last bit."""
    listed = build_stages(two_names('persona', (0, 1)), tmp_path)
    needed = [stage for stage in listed if not stage.name.startswith(('logs', 'matrix', 'likelihood'))]
    stages_lib.run_stages(
        tmp_path, [stage for stage in needed if '-copy/seed-1' not in stage.name], on_event=lambda _: None
    )

    def left(arm: str) -> list[bytes]:
        """Conversations and result of training, and the result with people."""
        names = ('conversations/rl.jsonl', 'result.json'), ('block-0/result.json',)
        return [
            (tmp_path / kind / arm / name).read_bytes()
            for kind, files in zip(('rl', 'people'), names, strict=True)
            for name in files
        ]

    assert left('persona/seed-0') == left('persona-copy/seed-0')
    assert not set(left('persona/seed-0')) & set(left('persona/seed-1'))  # the bytes tell runs apart


def test_a_fine_tuned_simulator_under_two_names_is_made_of_equal_settings():
    listed = {stage.name: to_dict(stage.settings) for stage in build_stages(two_names('fine_tuned', (3,)), WORKDIR)}
    copies = [name for name in listed if '-copy' in name]
    assert {name.split('/')[0] for name in copies} == {'sft', 'rl', 'people', 'matrix', 'likelihood'}
    assert all(listed[name] == listed[name.replace('-copy', '')] for name in copies)


def test_sizes_have_user_models_of_their_own():
    listed = stages(name='concierge')
    assert listed['rl/fine_tuned-large/seed-0'].inputs['simulator'] == WORKDIR / 'sft/fine_tuned-large/seed-0'
    assert listed['rl/role_play-small/seed-0'].inputs['simulator'] == WORKDIR / 'sft/base_user-small'
    dims = {name: to_dict(s.settings)['model']['model_dim'] for name, s in listed.items() if 'sft/base_user' in name}
    assert dims['sft/base_user-small'] < dims['sft/base_user'] < dims['sft/base_user-large']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'arms': {'a': {'simulator': 'roleplay'}}}, r"arms\.a\.simulator: expected one of .* found 'roleplay'"),
        ({'arms': {'a': {'simulator': 'persona', 'size': 'huge'}}}, r"arms\.a\.size: expected one of medium.*'huge'"),
        ({'arms': {'a': {}}}, r'config\.arms\.a\.simulator: missing'),
        ({'arms': {}}, r'config.arms: expected at least one arm'),
        ({'arms': {'a/b': {'simulator': 'persona'}}}, r"config.arms: expected names of letters.*found 'a/b'"),
        ({'arms': {'initial': {'simulator': 'persona'}}}, r"config.arms: expected .* not 'initial', found 'initial'"),
        (
            {'arms': {'a': {'simulator': 'persona'}, 'A': {'simulator': 'persona'}}},
            r"config.arms: expected names that differ in more than case, found 'a' and 'A'",
        ),
        ({'seeds': (1, 1)}, r'config.seeds: expected different values, at least one, found \(1, 1\)'),
        ({'seeds': (-1,)}, r'config.seeds: expected numbers from 0 to 2147483647, found \(-1,\)'),
        ({'seeds': (2**31,)}, r'config.seeds: expected numbers from 0 to 2147483647'),
        ({'evaluation__people': 0}, r'config.evaluation.people: expected at least 1, found 0'),
        ({'evaluation__people': 65}, r'config.evaluation.people: expected a multiple of block=64, found 65'),
        ({'evaluation__shown': 65}, r'config.evaluation.shown: expected 0 to 64, .* found 65'),
        ({'rl_people': 3}, r'config.rl.prompts_per_step: expected at most the 3 examples .* found 4'),
        (
            {'rl__samples_per_prompt': 1},
            r"config.rl.samples_per_prompt: expected at least 2 \(advantage 'grpo' .* found 1",
        ),
        (
            {'rl__optimizer__learning_rate': 0.0},
            r'config.rl.optimizer.learning_rate: expected a number above 0, found 0',
        ),
        ({'compute__loop__max_unjudged': 0.0}, r'config.compute.loop.max_unjudged: expected a share in \(0, 1\]'),
        ({'rl__optimizer__warmup_steps': 99}, r'config.rl.optimizer.warmup_steps: expected fewer than the 6 updates'),
        ({'users__medium__base__optimizer__warmup_steps': 99}, r'config.users.medium.base.optimizer.warmup_steps'),
        ({'assistant__sft__batch__lengths': (40, 1024)}, r'config.assistant.sft.batch.lengths: expected at most'),
        ({'compute__rows_in_flight': 5}, r'config.compute.rows_in_flight: expected None or a divisor of the 16'),
        ({'world__dial': 1.5}, r'config.world.dial: expected a number in \[0, 1\], found 1.5'),
        ({'corpora__logs': 0}, r'config.corpora.logs: expected at least 1, found 0'),
        ({'workers': 0}, r'config.workers: expected at least 1, or None, found 0'),
        ({'rl__trained': 'user'}, r"config.rl.trained: expected 'assistant', found 'user'"),
        ({'limits__turns': 6}, r'config.limits.turns: expected at most 5, .* found 6'),
        (
            {'limits__user_tokens': 400},
            r'config.assistant.model.max_positions: expected at least the 1264 tokens.*found 512',
        ),
        ({'rl_people': 0}, r'config.rl_people: expected at least 1, found 0'),
        ({'held_out_simulators': ('gone',)}, r"config.held_out_simulators: expected names of arms, found 'gone'"),
        (
            {'held_out_simulators': ('oracle',)},
            r"config.held_out_simulators: expected simulators, found 'oracle': every assistant is measured on people",
        ),
        (
            {'arms': arms('persona'), 'held_out_simulators': ('persona',)},
            r"config.held_out_simulators: expected .* at least one that trains assistants, found \('persona',\) of 1",
        ),
        ({'held_out_simulators': ('persona', 'persona')}, r'config.held_out_simulators: expected different arms'),
        ({'assistant__model__num_heads': 0}, r'^config.assistant.model.num_heads: expected at least 1, found 0'),
        (
            {'assistant__model__num_kv_heads': 3},
            r'^config.assistant.model.num_heads: expected a multiple of num_kv_heads=3, found',
        ),
        (
            {'users__medium__model__num_kv_heads': 3},
            r'^config.users.medium.model.num_heads: expected a multiple of num_kv_heads=3, found',
        ),
        (
            {'users__medium__model__num_layers': -1},
            r'^config.users.medium.model.num_layers: expected at least 1, found -',
        ),
        (
            {'users__medium__model__model_dim': 4, 'users__medium__model__num_heads': 4},
            r'^config.users.medium.model.model_dim: expected heads of an even size, .*, found 4 // 4 = 1',
        ),
        ({'rl__optimizer__learning_rate': math.inf}, r'^config.rl.optimizer.learning_rate: expected a finite number'),
        ({'evaluation__seed': -1}, r'config.evaluation.seed: expected a number from 0 to 2147483647, found -1'),
        ({'evaluation__seed': 2**31}, r'config.evaluation.seed: expected a number from 0 to 2147483647, found 2147483'),
        ({'scene': 'somewhere'}, r"config.scene: expected one of concierge, pretrained, found 'somewhere'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        scene_of(settings(**changes), WORKDIR).check()


def test_workers_follow_the_machine_unless_told():
    assert experiment.workers_of(settings(workers=1)) == 1
    assert 1 <= experiment.workers_of(settings()) <= 8


def test_a_plan_refuses_what_the_run_refuses(tmp_path, capsys):
    made_run(tmp_path, settings(evaluation__replayed=4))
    config = to_dict(settings(evaluation__replayed=8))
    for show_plan in (True, False):
        with pytest.raises(WorkdirError, match=r'replay/role_play, .*\(conversations: 4 -> 8\).*--rerun=replay\)'):
            experiment.run(config, tmp_path, show_plan=show_plan)
    assert 'refused (other settings: conversations: 4 -> 8): replay/role_play' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ({'only': ('sft', 'forecast')}, '--only=forecast: .*no stages; config.evaluation.forecast.examples=N switches'),
        ({'only': ('people_forecast/',)}, '--only=people_forecast/: .*config.evaluation.forecast.examples=N'),
        ({'rerun': ('replay/role_play',)}, '--rerun=replay/role_play: .*config.evaluation.replayed=N'),
    ],
)
def test_a_measure_that_is_off_names_its_setting(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        experiment.run(to_dict(settings()), tmp_path, **flags)
    assert not list(tmp_path.iterdir())


def test_stages_of_a_measure_that_is_off_are_named_as_not_in_the_results(tmp_path, monkeypatch, capsys):
    scene = made_run(tmp_path, settings(evaluation__replayed=4, evaluation__forecast={'samples': 2, 'n': 2}))
    monkeypatch.setattr(stages_lib, 'run_stages', lambda *_: None)
    monkeypatch.setattr(results, 'write_results', lambda *_: None)
    experiment.run(to_dict(settings(workers=1, evaluation__replayed=4)), tmp_path)
    line = '{}/...: done in this run, but not in the results: config.evaluation.{}=N is not set'
    printed = capsys.readouterr().out
    assert line.format('forecast', 'forecast.examples') in printed
    assert 'replay/...' not in printed
    undo(scene, 'forecast', 'people_forecast')
    experiment.run(to_dict(settings(workers=1)), tmp_path)
    printed = capsys.readouterr().out
    assert line.format('replay', 'replayed') in printed
    assert 'forecast/...' not in printed
