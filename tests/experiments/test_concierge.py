"""The concierge world as a scene: people, what they are told, the reward, and the likelihood of their messages."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from simrl.conversations.batches import BatchSettings, stack
from simrl.conversations.records import write_conversations
from simrl.conversations.sentencepiece import train_sentencepiece
from simrl.conversations.views import told_intent, user_rows
from simrl.evaluation.fidelity.likelihood import row_log_likelihoods
from simrl.experiments import concierge_setup
from simrl.experiments.concierge import ConciergeScene
from simrl.experiments.concierge_people import people_agent, people_examples, satisfaction
from simrl.experiments.concierge_stages import ConciergeStages
from simrl.models import transformer
from simrl.models.sharding import make_mesh
from simrl.models.transformer import Execution
from simrl.rollouts.agents import HostConversation
from simrl.rollouts.state import EndReason, example_hash
from simrl.rollouts.trajectories import Trajectories
from simrl.run.config import ConfigError
from simrl.training.sft import token_losses
from simrl.worlds.concierge import replies as world_program
from simrl.worlds.concierge import scripted
from simrl.worlds.concierge.people import World, person_of, persona_name
from tests.experiments.scene import settings


@pytest.fixture(scope='module')
def pieces() -> bytes:
    corpus = scripted.base_user_corpus(World(), 300)
    return train_sentencepiece([t for c in corpus for t in (c.intent, *(x.content for x in c.messages))], 300)


@pytest.fixture(scope='module')
def scene(pieces, tmp_path_factory) -> ConciergeScene:
    """A scene whose world has its tokenizer."""
    workdir = tmp_path_factory.mktemp('run')
    (workdir / concierge_setup.WORLD_STAGE).mkdir()
    (workdir / concierge_setup.WORLD_STAGE / concierge_setup.TOKENIZER_FILE).write_bytes(pieces)
    return ConciergeScene(settings(), workdir)


@pytest.mark.parametrize(('own', 'training'), [(2, 0), (2, 3), (0, 3)])
def test_the_training_seed_is_added_to_that_of_the_batches(own, training, scene, tmp_path, monkeypatch):
    user = settings(users__medium__fine_tuning__batch__seed=own).users['medium']
    write_conversations(tmp_path / concierge_setup.LOGS, scripted.base_user_corpus(World(), 4))
    write_conversations(tmp_path / concierge_setup.HELD_OUT_LOGS, scripted.base_user_corpus(World(), 2))
    fitted = []
    monkeypatch.setattr(concierge_setup, '_fit', lambda *args: fitted.append(args[6].batch.seed))
    config = user.model.transformer_config(scene.chat.size)
    fitting = concierge_setup.Fitting(tmp_path, scene.chat, scene.compute, 2)
    concierge_setup.fine_tune_simulator(tmp_path, config, {}, user.fine_tuning, fitting, tmp_path, training)
    assert fitted == [own + training]


def test_people_answer_what_they_heard_and_nothing_else(scene):
    examples = people_examples(scene.settings.world, 'test', range(8))
    heard = (('user', 'x'), ('assistant', 'which food?'), ('user', 'y'), ('assistant', 'try cheap thai'))
    seeds = np.arange(8, dtype=np.uint32)
    conversations = [HostConversation(example, 0, heard) for example in examples]
    replies = people_agent(scene.settings.world, scene.limits).reply(conversations, seeds)
    for example, seed, reply in zip(examples, seeds.tolist(), replies, strict=True):
        expected = world_program.speak(
            person_of(scene.settings.world, example.id), ['which food?', 'try cheap thai'], seed
        )
        assert (reply.text, reply.ends) == (expected.text, expected.end is not None)


def test_the_reward_is_the_satisfaction_of_whoever_the_row_is_about(scene):
    examples = people_examples(scene.settings.world, 'test', range(3))
    met = [e.intent.split() for e in examples]  # 'food thai price any ...'
    proposal = 'try ' + ' '.join(v for v in met[0][1::2] if v != 'any')
    order = [0, 2, 0, 1]  # rows of a batch, in any order
    texts = [('thai', proposal, 'ok thanks'), ('thai', proposal, 'forget it'), ('thai', 'hm'), ('thai', '')]
    messages = np.zeros((4, 10, 20), np.int32)
    lengths = np.zeros((4, 10), np.int32)
    for row, contents in enumerate(texts):
        for number, text in enumerate(contents):
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
            'num_messages': np.array([len(contents) for contents in texts]),
            'end_reason': np.array([EndReason.SIGNAL, EndReason.SIGNAL, EndReason.TURNS, EndReason.TURNS]),
            'example_id': np.array([example_hash(examples[i].id) for i in order], np.uint32),
        }
    )
    rewards = satisfaction(scene.chat, examples)(batch)
    assert rewards.value.dtype == np.float32
    np.testing.assert_allclose(rewards.value, [0.97, -0.03, -0.03, -0.03], atol=1e-6)
    np.testing.assert_array_equal(rewards.parts['left'], [0, 1, 0, 0])
    assert np.all(rewards.valid)


def test_prompts_that_are_too_long_are_named_before_anything_is_trained(scene):
    assert ConciergeScene(settings(limits__prompt_tokens=64), scene.workdir).chat.size == scene.chat.size
    with pytest.raises(ConfigError, match=r'config.limits.prompt_tokens: expected at least \d+, .*food .* found 9'):
        _ = ConciergeScene(settings(limits__prompt_tokens=9), scene.workdir).chat


def test_a_hash_that_two_examples_share_is_refused(scene):
    example = people_examples(scene.settings.world, 'test', [0])[0]
    with pytest.raises(ValueError, match='expected 2 examples with hashes of their own, found 1 hashes'):
        satisfaction(scene.chat, [example, example])


def test_simulators_are_told_the_intent_and_whom_to_play(scene, monkeypatch):
    example = people_examples(scene.settings.world, 'test', [5])[0]

    def load(self: ConciergeStages, stage: pathlib.Path, model, mesh):
        config = model.transformer_config(self.chat.size)
        return config, transformer.init_params(jax.random.key(0), config)

    monkeypatch.setattr(ConciergeStages, 'load', load)

    def told(arm: str) -> str:
        return scene.chat.decode(scene.simulator(arm, 0).prompt(example).tokens)

    assert f'default: {example.intent}' in told('role_play')
    assert f'{persona_name(example.persona_seed)}: {example.intent}' in told('persona')
    assert example.intent in told('fine_tuned')
    assert ':' not in told('fine_tuned')


def test_people_have_no_model_and_a_simulator_that_of_its_size(scene):
    assert scene.simulator_model('oracle') is None
    assert scene.simulator_model('persona') == scene.model_configs()['user model medium']


def test_likelihoods_of_rows_add_up_to_the_loss_of_batches(scene):
    rows, _ = user_rows(
        scripted.base_user_corpus(World(), 13), scene.chat, 128, on_long='cut', system=told_intent, openings='trained'
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
