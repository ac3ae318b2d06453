"""The plan of the known-answer experiment: equal arms, growth without repetition, and sizes that cannot be."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import concierge, quickstart
from simrl.conversations.batches import BatchSettings, stack
from simrl.conversations.records import write_conversations
from simrl.conversations.sentencepiece import sentencepiece_chat, train_sentencepiece
from simrl.conversations.views import user_rows
from simrl.evaluation.fidelity import row_log_likelihoods
from simrl.experiments import known_answer_stages
from simrl.experiments.concierge_scene import (
    TOKENIZER_FILE,
    Scene,
    open_scene,
    people_examples,
    people_partner,
    satisfaction,
    simulator,
)
from simrl.experiments.known_answer import KnownAnswer, Plan, num_workers
from simrl.experiments.known_answer import tasks as plan_of
from simrl.models import transformer
from simrl.models.sharding import make_mesh
from simrl.models.transformer import Execution
from simrl.rollouts.agents import HostConversation
from simrl.rollouts.state import EndReason, example_hash
from simrl.rollouts.trajectories import Trajectories
from simrl.run.config import ConfigError, from_config_dict, to_dict
from simrl.run.stages import Stage, run_stages
from simrl.training.sft import token_losses
from simrl.worlds.concierge import replies as world_program
from simrl.worlds.concierge import scripted
from simrl.worlds.concierge.people import World, person_of, persona_name

WORKDIR = pathlib.Path('run')


def settings(arg: str = 'smoke', name=quickstart, **changes) -> KnownAnswer:
    """The settings of a config with dotted fields changed."""
    config = name.get_config(arg)
    for field, value in changes.items():
        part = config
        *path, last = field.split('__')
        for key in path:
            part = part[key]
        with part.unlocked():
            part[last] = value
    fields = dict(config)
    assert fields.pop('job') == 'known_answer'
    return from_config_dict(KnownAnswer, fields, 'config')


def tasks(**changes) -> dict[str, Stage]:
    return {task.name: task for task in Plan(settings(**changes), WORKDIR).tasks()}


def identity(task: Stage) -> str:
    return json.dumps([to_dict(task.settings), {name: str(path) for name, path in task.inputs.items()}], sort_keys=True)


def test_every_stage_comes_after_what_it_reads():
    seen: set[pathlib.Path] = set()
    for name, task in tasks(name=concierge, arg='').items():
        assert set(task.inputs.values()) <= seen, name
        seen.add(WORKDIR / name)


@pytest.mark.parametrize(
    ('before', 'after', 'new'),
    [
        ({'arms': ('role_play',)}, {'arms': ('role_play', 'oracle')}, 'oracle'),
        ({'seeds': (0,)}, {'seeds': (0, 1)}, 'seed-1'),
        ({'seeds': (0,)}, {'seeds': (1, 0)}, 'seed-1'),
        ({'evaluation__people': 64}, {'evaluation__people': 192}, 'block-'),
        ({'arms': ('role_play',)}, {'arms': ('role_play', 'persona')}, 'persona'),
    ],
)
def test_an_addition_computes_only_what_is_new(before, after, new):
    first, second = tasks(**before), tasks(**after)
    assert first.keys() < second.keys()
    assert all(identity(task) == identity(second[name]) for name, task in first.items())
    assert all(new in name for name in second.keys() - first.keys())


def test_arms_differ_in_their_simulator_alone():
    plan = tasks(seeds=(0, 1))
    for seed in (0, 1):
        slices = [dict(to_dict(plan[f'rl/{arm}/seed-{seed}'].settings)) for arm in settings().arms]
        assert len({part.pop('kind') for part in slices}) == len(slices)
        assert all(part == slices[0] for part in slices)
    both = [dict(to_dict(plan[f'rl/persona/seed-{seed}'].settings)) for seed in (0, 1)]
    assert [part.pop('seed') for part in both] == [0, 1]
    assert both[0] == both[1]


def test_a_fine_tuned_simulator_is_trained_anew_for_each_seed():
    plan = tasks(seeds=(0, 3))
    for seed in (0, 3):
        assert plan[f'rl/fine_tuned/seed-{seed}'].inputs['simulator'] == WORKDIR / f'sft/fine_tuned/seed-{seed}'
        assert plan[f'rl/role_play/seed-{seed}'].inputs['simulator'] == WORKDIR / 'sft/base_user'
    assert 'simulator' not in plan['rl/oracle/seed-0'].inputs


def test_seeds_may_be_run_one_by_one_and_an_assistant_meets_the_simulators_of_its_own():
    together, apart = tasks(seeds=(3, 0)), {**tasks(seeds=(0,)), **tasks(seeds=(3,))}
    assert {name: identity(task) for name, task in together.items()} == {
        name: identity(task) for name, task in apart.items()
    }
    matrix = [name.split('/', 1)[1] for name in together if name.startswith('matrix/')]
    met = {name for name in matrix if name.startswith('oracle/seed-3/')}
    assert met == {f'oracle/seed-3/{user}' for user in ('role_play', 'persona', 'fine_tuned/seed-3')}
    met = {name for name in matrix if name.startswith('initial/')}
    assert met == {f'initial/{user}' for user in ('role_play', 'persona', 'fine_tuned/seed-3', 'fine_tuned/seed-0')}
    for seed in (0, 3):
        for stage in (f'matrix/oracle/seed-{seed}/fine_tuned/seed-{seed}', f'likelihood/fine_tuned/seed-{seed}'):
            assert together[stage].inputs['simulator'] == WORKDIR / f'sft/fine_tuned/seed-{seed}'


@pytest.mark.parametrize(('own', 'training'), [(2, 0), (2, 3), (0, 3)])
def test_the_training_seed_is_added_to_that_of_the_batches(own, training, scene, tmp_path, monkeypatch):
    users = settings(users__medium__fine_tuning__batch__seed=own).users['medium']
    write_conversations(tmp_path / known_answer_stages.LOGS, scripted.base_user_corpus(World(), 4))
    write_conversations(tmp_path / known_answer_stages.HELD_OUT_LOGS, scripted.base_user_corpus(World(), 2))
    fitted = []
    monkeypatch.setattr(known_answer_stages, '_load', lambda *_: {})
    monkeypatch.setattr(known_answer_stages, '_fit', lambda *args: fitted.append(args[-1].batch.seed))
    known_answer_stages.fine_tune_simulator(
        tmp_path, tmp_path, tmp_path, scene, users.model, users.fine_tuning, training
    )
    assert fitted == [own + training]


@pytest.mark.parametrize(
    ('field', 'refused'),
    [('logs', 'logs'), ('vocabulary', 'world'), ('assistant', 'world'), ('base_user', 'world')],
)
def test_other_text_changes_the_stage_that_makes_it_alone(field, refused):
    before, after = tasks(), tasks(**{f'corpora__{field}': 300})
    assert [name for name, task in before.items() if identity(task) != identity(after[name])] == [refused]


def two_names(kind: str, workdir: pathlib.Path, seeds: tuple[int, ...]) -> list[Stage]:
    """The plan of two arms that are equal but for their names, smaller still than the smoke test's."""
    user = to_dict(quickstart.get_config('smoke').users.medium)
    user['base']['batch']['lengths'] = [128]
    own = settings(
        users={'medium': user, 'copy': user},
        arms=(kind, f'{kind}-copy'),
        seeds=seeds,
        assistant__sft__batch__lengths=(128,),
        rl__row_buckets=(200,),
        rl__steps=1,
    )
    return Plan(own, workdir).tasks()


def test_one_simulator_under_two_names_gives_the_same_bytes(tmp_path):
    """A control of the instrument: arms that are equal but for their names are one arm, to the last bit."""
    plan = two_names('persona', tmp_path, (0, 1))
    needed = [task for task in plan if not task.name.startswith(('logs', 'matrix', 'likelihood'))]
    run_stages(tmp_path, [task for task in needed if '-copy/seed-1' not in task.name], on_event=lambda _: None)

    def left(arm: str) -> list[bytes]:
        """What was said in training, and what came out with people."""
        names = ('conversations/rl.jsonl', 'result.json'), ('block-0/result.json',)
        return [
            (tmp_path / kind / arm / name).read_bytes()
            for kind, files in zip(('rl', 'people'), names, strict=True)
            for name in files
        ]

    assert left('persona/seed-0') == left('persona-copy/seed-0')
    assert not set(left('persona/seed-0')) & set(left('persona/seed-1'))  # the bytes tell runs apart


def test_a_fine_tuned_simulator_under_two_names_is_made_of_equal_slices():
    plan = {task.name: to_dict(task.settings) for task in two_names('fine_tuned', WORKDIR, (3,))}
    copies = [name for name in plan if '-copy' in name]
    assert {name.split('/')[0] for name in copies} == {'sft', 'rl', 'people', 'matrix', 'likelihood'}
    assert all(plan[name] == plan[name.replace('-copy', '')] for name in copies)


def test_sizes_have_user_models_of_their_own():
    plan = tasks(name=concierge)
    assert plan['rl/fine_tuned-large/seed-0'].inputs['simulator'] == WORKDIR / 'sft/fine_tuned-large/seed-0'
    assert plan['rl/role_play-small/seed-0'].inputs['simulator'] == WORKDIR / 'sft/base_user-small'
    dims = {
        name: to_dict(plan[name].settings)['model']['model_dim'] for name in plan if name.startswith('sft/base_user')
    }
    assert dims['sft/base_user-small'] < dims['sft/base_user'] < dims['sft/base_user-large']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'arms': ('roleplay',)}, r"config.arms: unknown arm 'roleplay'.*role_play, persona, fine_tuned, oracle"),
        ({'arms': ('persona-huge',)}, r"unknown arm 'persona-huge'"),
        ({'arms': ()}, r'config.arms: expected different values, at least one'),
        ({'seeds': (1, 1)}, r'config.seeds: expected different values, at least one, found \(1, 1\)'),
        ({'seeds': (-1,)}, r'config.seeds: expected numbers from 0 to 2147483647, found \(-1,\)'),
        ({'seeds': (2**31,)}, r'config.seeds: expected numbers from 0 to 2147483647'),
        ({'evaluation__people': 0}, r'config.evaluation.people: expected at least 1, found 0'),
        ({'evaluation__people': 65}, r'config.evaluation.people: expected a multiple of block=64, found 65'),
        ({'evaluation__shown': 65}, r'config.evaluation.shown: expected 0 to block=64, found 65'),
        ({'rl_people': 7}, r'config.rl.prompts_per_step: expected at most 7, found 8'),
        ({'rl__optimizer__warmup_steps': 99}, r'config.rl.optimizer.warmup_steps: expected fewer than the 6 updates'),
        ({'users__medium__base__optimizer__warmup_steps': 99}, r'config.users.medium.base.optimizer.warmup_steps'),
        ({'assistant__sft__batch__lengths': (40, 1024)}, r'config.assistant.sft.batch.lengths: expected at most'),
        ({'computing__rows_in_flight': 5}, r'config.compute.rows_in_flight: expected None or a divisor of the 32'),
        ({'world__dial': 1.5}, r'config.world.dial: expected a number in \[0, 1\], found 1.5'),
        ({'corpora__logs': 0}, r'config.corpora.logs: expected at least 1, found 0'),
        ({'workers': 0}, r'config.workers: expected at least 1, or None, found 0'),
        ({'rl__trained': 'user'}, r"config.rl.trained: expected 'assistant', found 'user'"),
        ({'limits__turns': 6}, r'config.limits.turns: expected at most 5, .* found 6'),
        (
            {'limits__user_tokens': 400},
            r'config.assistant.model.max_positions: expected at least the 2096 tokens.*found 512',
        ),
        ({'rl_people': 0}, r'config.rl_people: expected at least 1, found 0'),
        ({'evaluation__seed': -1}, r'config.evaluation.seed: expected a number from 0 to 2147483647, found -1'),
        ({'evaluation__seed': 2**31}, r'config.evaluation.seed: expected a number from 0 to 2147483647, found 2147483'),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(settings(**changes), WORKDIR)


def test_workers_follow_the_machine_unless_told():
    assert num_workers(settings(workers=3)) == 3
    assert 1 <= num_workers(settings()) <= 8


@pytest.fixture(scope='module')
def pieces() -> bytes:
    corpus = scripted.base_user_corpus(World(), 300)
    return train_sentencepiece([t for c in corpus for t in (c.intent, *(x.content for x in c.messages))], 300)


@pytest.fixture(scope='module')
def scene(pieces) -> Scene:
    s = settings()
    return Scene(s.world, sentencepiece_chat(pieces), s.limits, s.compute)


def test_people_answer_what_they_heard_and_nothing_else(scene):
    examples = people_examples(scene.world, 'test', range(8))
    heard = (('user', 'x'), ('assistant', 'which food?'), ('user', 'y'), ('assistant', 'try cheap thai'))
    seeds = np.arange(8, dtype=np.uint32)
    conversations = [HostConversation(example, 0, heard) for example in examples]
    replies = people_partner(scene).reply(conversations, seeds)
    for example, seed, reply in zip(examples, seeds.tolist(), replies, strict=True):
        said = world_program.speak(person_of(scene.world, example.id), ['which food?', 'try cheap thai'], seed)
        assert (reply.text, reply.ends) == (said.text, said.end is not None)


def test_the_reward_is_the_satisfaction_of_whoever_the_row_is_about(scene):
    examples = people_examples(scene.world, 'test', range(3))
    met = [e.intent.split() for e in examples]  # 'food thai price any ...'
    proposal = 'try ' + ' '.join(v for v in met[0][1::2] if v != 'any')
    order = [0, 2, 0, 1]  # rows of a batch, in any order
    texts = [('thai', proposal, 'ok thanks'), ('thai', proposal, 'forget it'), ('thai', 'hm'), ('thai', '')]
    messages = np.zeros((4, 10, 20), np.int32)
    lengths = np.zeros((4, 10), np.int32)
    for row, said in enumerate(texts):
        for number, text in enumerate(said):
            ids = scene.chat.encode(text) + ([scene.chat.terminal] if number == 2 else [])
            messages[row, number, : len(ids)] = ids
            lengths[row, number] = len(ids)
    empty = {field.name: np.zeros(4, np.int32) for field in dataclasses.fields(Trajectories)}
    batch = Trajectories(
        **empty
        | {
            'messages': messages,
            'message_length': lengths,
            'truncated': np.zeros((4, 10), bool),
            'num_messages': np.array([len(said) for said in texts]),
            'end_reason': np.array([EndReason.SIGNAL, EndReason.SIGNAL, EndReason.TURNS, EndReason.TURNS]),
            'example_id': np.array([example_hash(examples[i].id) for i in order], np.uint32),
        }
    )
    rewards = satisfaction(scene, examples)(batch)
    assert rewards.value.dtype == np.float32
    np.testing.assert_allclose(rewards.value, [0.97, -0.03, -0.03, -0.03], atol=1e-6)
    np.testing.assert_array_equal(rewards.parts['left'], [0, 1, 0, 0])
    assert np.all(rewards.valid)


def test_prompts_that_are_too_long_are_named_before_anything_is_trained(pieces, tmp_path):
    s = settings(limits__prompt_tokens=64)
    (tmp_path / TOKENIZER_FILE).write_bytes(pieces)
    assert open_scene(tmp_path, s.world, s.limits, s.compute).limits == s.limits
    with pytest.raises(ConfigError, match=r'config.limits.prompt_tokens: expected at least \d+, .*food .* found 9'):
        open_scene(tmp_path, s.world, dataclasses.replace(s.limits, prompt_tokens=9), s.compute)


def test_a_hash_that_two_examples_share_is_refused(scene):
    example = people_examples(scene.world, 'test', [0])[0]
    with pytest.raises(ValueError, match='expected 2 examples with hashes of their own, found 1 hashes'):
        satisfaction(scene, [example, example])


def test_simulators_are_told_the_intent_and_whom_to_play(scene):
    example = people_examples(scene.world, 'test', [5])[0]
    config = settings().users['medium'].model.transformer_config(scene.chat.size)
    params = transformer.init_params(jax.random.key(0), config)

    def told(kind: str) -> str:
        return scene.chat.decode(simulator(kind, scene, config, params).prompt(example).tokens)

    assert f'default: {example.intent}' in told('role_play')
    assert f'{persona_name(example.persona_seed)}: {example.intent}' in told('persona')
    assert example.intent in told('fine_tuned')
    assert ':' not in told('fine_tuned')


def test_likelihoods_of_rows_add_up_to_the_loss_of_batches(scene):
    rows, _ = user_rows(
        scripted.base_user_corpus(World(), 13), scene.chat, 128, on_long='cut', intents=True, openings='trained'
    )
    config = settings().users['medium'].model.transformer_config(scene.chat.size)
    params = transformer.init_params(jax.random.key(0), config)
    token_mask = scene.chat.token_mask(config.padded_vocab_size, terminal=True, header='user')
    batch = BatchSettings(4, (64, 128))
    mesh = make_mesh(1, 1, jax.devices()[:1])
    sums, counts = row_log_likelihoods(params, rows, token_mask, batch, config=config, execution=Execution(), mesh=mesh)
    loss = jax.jit(token_losses, static_argnames=('config', 'execution'))
    for row, log_likelihood, count in zip(rows, sums, counts, strict=True):
        total, number = loss(params, stack([row], 128, 1), token_mask, config=config, execution=Execution())['loss']
        assert number == count
        np.testing.assert_allclose(log_likelihood, -total, rtol=1e-5)
