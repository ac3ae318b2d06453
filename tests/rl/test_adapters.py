"""Training by adapters: what is learnt, what is stored and saved, and what stays as it was."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from simrl.conversations.batches import BatchSettings, stack
from simrl.conversations.chat import Chat
from simrl.experiments.outputs import metric_lines
from simrl.models import lora, sharding, transformer
from simrl.models.checkpoint import Checkpoints
from simrl.models.transformer import Execution, Params
from simrl.training import partition, sft
from simrl.training.optimizer import OptimizerSettings, TrainState
from simrl.training.sft import SFTSettings
from tests.rl import scene

STEPS = 40


@dataclasses.dataclass(frozen=True)
class Run:
    folder: pathlib.Path
    start: Params
    state: TrainState


@pytest.fixture(scope='module')
def tuned(tmp_path_factory: pytest.TempPathFactory, chat: Chat, mesh: Mesh) -> Run:
    """Fine-tuning of a model that lies on the mesh, on a few rows again and again."""
    folder, config = tmp_path_factory.mktemp('tuned'), scene.config_of(chat)
    start = sharding.init_sharded(jax.random.key(0), config, mesh, sharding.TRAINING_RULES)
    state = sft.fine_tune(
        folder,
        lambda: start,
        scene.sft_rows(scene.ROWS),
        scene.sft_rows(scene.ROWS),
        config=config,
        token_mask=chat.token_mask(config.padded_vocab_size, terminal=True, header='user'),
        execution=scene.EXECUTION,
        settings=SFTSettings(
            STEPS, BatchSettings(scene.ROWS, (scene.LENGTH,)), OptimizerSettings(3e-2), lora=scene.LORA
        ),
        loop_settings=scene.loop_settings(evaluate_every=STEPS),
        mesh=mesh,
    )
    return Run(folder, start, state)


def test_the_loss_falls_from_that_of_the_base_model(tuned: Run, chat: Chat) -> None:
    first, *_, last = metric_lines(tuned.folder)
    config = scene.config_of(chat)
    token_mask = jnp.asarray(chat.token_mask(config.padded_vocab_size, terminal=True, header='user'))
    batch = stack(scene.sft_rows(scene.ROWS), scene.LENGTH, scene.ROWS)
    total, count = sft.token_losses(tuned.start, batch, token_mask, config=config, execution=scene.EXECUTION)['loss']
    assert first['held_out/loss'] == pytest.approx(float(total / count), rel=1e-5)
    # The frozen embedding, of small random weights, bounds the logits: the loss cannot fall by more than 0.65.
    assert last['held_out/loss'] < first['held_out/loss'] - 0.4


def test_state_and_checkpoints_hold_adapters_and_nothing_else(tuned: Run, chat: Chat) -> None:
    numbers = sum(x.size for x in jax.tree.leaves(lora.init(jax.random.key(0), scene.config_of(chat), scene.LORA)))
    assert numbers < sum(x.size for x in jax.tree.leaves(tuned.start)) / 5
    found = sum(x.size for x in jax.tree.leaves(tuned.state))
    assert found == 3 * numbers + 3  # parameters and two moments; the counts of updates, of steps and of faults
    assert set(tuned.state.params) == set(tuned.state.opt_state) == {'adapters'}
    assert set(tuned.state.params['adapters']) == set(scene.LORA.targets)
    with Checkpoints(tuned.folder / 'checkpoints', keep=2) as checkpoints:
        _, state, _ = checkpoints.restore(tuned.state)  # which compares the names and shapes of all that is stored
    for saved, last in zip(jax.tree.leaves(state), jax.tree.leaves(tuned.state), strict=True):
        np.testing.assert_array_equal(saved, last)


def test_the_whole_decoder_says_what_base_and_adapters_do(tuned: Run, chat: Chat, mesh: Mesh) -> None:
    config = scene.config_of(chat)
    whole = partition.whole_decoder(lambda: tuned.start, tuned.state.params, config, scene.LORA, mesh)
    tokens = jnp.asarray(stack(scene.sft_rows(scene.ROWS), scene.LENGTH, scene.ROWS).tokens)
    adapted = tuned.start | tuned.state.params | {'adapter_scale': jnp.float32(scene.LORA.scale)}
    found, expected, base = (
        transformer.apply(params, config, scene.EXECUTION, tokens)[0] for params in (whole, adapted, tuned.start)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.max(np.abs(expected - base)) > 0.1
    changed = {
        name
        for name, weights in whole['decoder']['layers'].items()
        if not np.array_equal(weights, tuned.start['decoder']['layers'][name])
    }
    assert changed == set(scene.LORA.targets)


def test_a_frozen_decoder_is_shared_where_it_lies_right_and_rounded_without_a_difference(
    chat: Chat, mesh: Mesh
) -> None:
    config = scene.config_of(chat)
    start = sharding.init_sharded(jax.random.key(0), config, mesh, sharding.TRAINING_RULES)

    def split(dtype: str, start: Params = start) -> tuple[Params, Params]:
        return partition.trained_and_frozen(start, config, scene.LORA, seed=0, dtype=dtype, mesh=mesh)

    trained, frozen = split('float32')
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (frozen['decoder'], start['decoder'])), strict=True))
    _, from_host = split('float32', jax.device_get(start))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(from_host))
    _, rounded = split('bfloat16')
    assert {x.dtype for x in jax.tree.leaves(rounded['decoder'])} == {jnp.dtype('bfloat16')}
    execution = Execution(dtype='bfloat16')
    tokens = jnp.asarray(scene.sft_rows(1)[0].tokens)[None]
    one, other = (
        transformer.project(params, transformer.apply(params, config, execution, tokens)[0])
        for params in (frozen | trained, rounded | trained)
    )
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope='module')
def reinforced(tmp_path_factory: pytest.TempPathFactory, chat: Chat, mesh: Mesh) -> Run:
    """RL after its first two steps, whose four optimizer steps train the critic alone."""
    folder = tmp_path_factory.mktemp('reinforced')
    warm_up = dataclasses.replace(scene.PPO, critic_warmup_steps=4)
    start = scene.sides(chat)[1].policy.params
    before = jax.device_get(start)
    every_step = scene.loop_settings(checkpoint_every=1, keep_checkpoints=3)
    end = scene.adapt(folder, chat, mesh, steps=3, loop_settings=every_step, algorithm=warm_up)
    with Checkpoints(folder / 'checkpoints', keep=3) as checkpoints:
        _, state, _ = checkpoints.restore(end, step=2)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (start, before)), strict=True))
    return Run(folder, before, state)


@pytest.mark.long
def test_the_critic_alone_moves_no_adapter(reinforced: Run, chat: Chat, mesh: Mesh) -> None:
    assert set(reinforced.state.params) == {'adapters', 'value_head'}
    assert np.any(reinforced.state.params['value_head']['kernel'])
    first, _ = partition.trained_and_frozen(
        reinforced.start, scene.config_of(chat), scene.LORA, seed=scene.SEED, dtype='float32', mesh=mesh
    )
    for name, adapter in reinforced.state.params['adapters'].items():
        np.testing.assert_array_equal(adapter['a'], first['adapters'][name]['a'])
        np.testing.assert_array_equal(adapter['b'], 0)
    assert [line['kl_k3'] for line in metric_lines(reinforced.folder)][:2] == [0, 0]


@pytest.mark.long
def test_before_they_learnt_anything_adapters_say_what_the_base_says(
    reinforced: Run, tmp_path: pathlib.Path, chat: Chat, mesh: Mesh
) -> None:
    scene.reinforce(tmp_path, chat, mesh, steps=1, loop_settings=scene.loop_settings())
    whole, adapted = (
        [json.loads(row) for row in (folder / 'conversations' / 'rl.jsonl').read_text().splitlines()][: scene.ROWS]
        for folder in (tmp_path, reinforced.folder)
    )
    assert [row['messages'] for row in adapted] == [row['messages'] for row in whole]
