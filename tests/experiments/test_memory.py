"""What an RL step needs of a device, by hand; and runs that do not fit, refused before anything is loaded."""

import dataclasses
import functools
import socket
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import paper, quickstart
from simrl.experiments import experiment
from simrl.experiments.banner import num_parameters
from simrl.experiments.memory import GIB, Other, StepMemory, caution, check_fits, fit_memory, refusal, step_memory
from simrl.models.attention import LONG_ROW
from simrl.models.lora import LoRASettings
from simrl.models.transformer import Execution, TransformerConfig
from simrl.rollouts.agents import Limits
from simrl.run import memory as run_memory
from simrl.run import processes
from simrl.run.config import ConfigError
from tests import many_devices
from tests.experiments.test_processes import Layout

CONFIG = TransformerConfig(256, 16, 3, 4, 2, 8, 32, max_positions=512, tied_embedding=True)
SIMULATOR = dataclasses.replace(CONFIG, num_layers=5, tied_embedding=False)
LIMITS = Limits(turns=2, prompt_tokens=16, assistant_tokens=8, user_tokens=24)
TOKENS = 16 + 2 * (8 + 24)


def mesh_of(data, model):
    return jax.sharding.AbstractMesh((data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


ONE, PARTNER = mesh_of(1, 1), Other('simulator', SIMULATOR, 'bfloat16')


def every_mesh(mesh=ONE, simulators=(PARTNER,), others=(), lora=None, simulator_mesh=None, **algorithm):
    settings = experiment.settings_of(quickstart.get_config())
    algorithm = {'minibatches': 2, 'microbatches': 2} | algorithm
    rl = dataclasses.replace(
        settings.rl,
        prompts_per_step=4,
        samples_per_prompt=4,
        row_buckets=(64, 128),
        lora=lora,
        algorithm=dataclasses.replace(settings.rl.algorithm, **algorithm),
    )
    compute = dataclasses.replace(
        settings.compute,
        training=Execution('bfloat16', remat='full', log_prob_chunk=32),
        sampling=Execution('bfloat16'),
        rows_in_flight=8,
    )
    return step_memory(
        *(CONFIG, simulators, others),
        settings=rl,
        compute=compute,
        limits=LIMITS,
        mesh=mesh,
        platform='cpu',
        simulator_mesh=simulator_mesh,
    )


def needed(*settings, **more):
    (found,) = every_mesh(*settings, **more)
    return found


def test_kinds_of_a_step_by_hand():
    found, number = needed(), num_parameters(CONFIG)
    assert found.kept == {
        'parameters': 4 * number,
        'optimizer': pytest.approx(8 * number, abs=100),  # and numbers of updates
        'reference': 2 * number,
        'simulator': 2 * num_parameters(SIMULATOR),
    }
    token = 2 * 2 * 8 * 2  # keys and values of a layer: two heads of eight numbers, two bytes each
    assert found.sampling == {
        'parameters to sample': 2 * number,
        "the assistant's cache": 8 * TOKENS * 3 * token,
        "the simulator's cache": 8 * TOKENS * 5 * token,
    }
    assert LONG_ROW['cpu'] > TOKENS  # so there are scores, of each of four heads
    layer = 6 * 16 + 4 * 4 * 8 + 4 * 32 + 2 * 4 * TOKENS
    assert found.updating == {
        'gradients': 4 * number,
        'activations': 4 * TOKENS * (layer + 3 * 16) * 2 + 32 * 3 * 4 * 256,
    }
    assert set(found.least) == {*found.kept, 'gradients'}
    assert set(found.most) == {*found.kept, *found.updating}


def test_devices_share_what_is_sharded():
    whole, split = needed(), needed(mesh_of(2, 2))
    norms = 4 * 16 * 7  # whole along `model`
    assert split.kept['parameters'] == pytest.approx(whole.kept['parameters'] / 4, abs=norms)
    assert split.kept['reference'] == pytest.approx(whole.kept['reference'] / 4, abs=norms)
    # In sampling weights are split over `model` alone, rows over `data`.
    assert split.kept['simulator'] == pytest.approx(whole.kept['simulator'] / 2, abs=2 * norms)
    assert split.sampling["the simulator's cache"] == whole.sampling["the simulator's cache"] // 4
    assert split.updating["the embedding's gradient"] == 3 * 4 * 256 * 16 // 2  # whole along `data`
    # Four devices read two heads of keys and values: each has one.
    assert needed(mesh_of(1, 4)).sampling["the assistant's cache"] == whole.sampling["the assistant's cache"] // 2


def test_settings_decide_what_is_kept():
    assert 'reference' not in needed(kl='none', kl_coef=0.0).kept
    adapted = needed(lora=LoRASettings(rank=2, alpha=4.0))
    assert adapted.kept['frozen'] == pytest.approx(2 * num_parameters(CONFIG), abs=4)  # which is the reference too
    assert adapted.kept['parameters'] < 2 * num_parameters(CONFIG)
    assert 'reference' not in adapted.kept
    critic = needed(advantage='gae', kl='none', kl_coef=0.0)
    assert critic.kept['parameters'] == needed().kept['parameters'] + 4 * 17  # a value head
    reward = needed(others=[Other('reward model', CONFIG, 'bfloat16', ('reward_head',))])
    assert reward.kept['reward model'] == 2 * num_parameters(CONFIG) + 4 * 17
    alone = needed(simulators=(None,))
    assert 'simulator' not in alone.kept
    assert alone.sampling["the assistant's cache"] == 2 * needed().sampling["the assistant's cache"]  # of two pieces


def test_members_of_a_mixture_are_all_kept_and_have_caches_in_turn():
    small = Other('simulator', CONFIG, 'bfloat16')
    found = needed(simulators=(PARTNER, small, PARTNER))
    assert found.kept['simulator'] == 2 * needed().kept['simulator'] + 2 * num_parameters(CONFIG)
    assert found.sampling == needed().sampling  # the larger one's
    remote = needed(simulators=(None, small))
    assert remote.sampling["the assistant's cache"] == 2 * found.sampling["the assistant's cache"]  # of two pieces


def test_each_mesh_has_its_own_where_no_device_is_in_both():
    place = {'platform': 'cpu', 'process_index': 0, 'device_kind': 'cpu'}
    devices = [mock.Mock(**place) for _ in range(6)]
    meshes = [
        jax.sharding.Mesh(np.array(own).reshape(2, -1), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)
        for own in (devices[:2], devices[2:])
    ]
    assistant, simulator = every_mesh(meshes[0], simulator_mesh=meshes[1])
    together = needed(mesh_of(2, 1))
    assert (assistant.mesh, assistant.devices) == ('config.compute.mesh', 2)
    assert assistant.kept == {kind: size for kind, size in together.kept.items() if kind != 'simulator'}
    assert assistant.updating == together.updating
    assert (simulator.mesh, simulator.devices) == ('config.compute.simulator_mesh', 4)
    split = needed(mesh_of(2, 2))
    assert simulator.kept == {'simulator': split.kept['simulator']}
    # Each of both shards has four rows, and one that enters a window: their batching is continuous.
    assert simulator.sampling == {"the simulator's cache": split.sampling["the simulator's cache"] * 5 // 4}
    assert len(every_mesh(meshes[0], simulators=(None,), simulator_mesh=meshes[1])) == 1  # nothing is there
    assert every_mesh(meshes[0], simulator_mesh=meshes[0])[0].kept == together.kept


STEP = StepMemory(
    {'parameters': 10 * GIB, 'simulator': 5 * GIB},
    {'parameters to sample': 2 * GIB, 'cache': 20 * GIB},
    {'gradients': 10 * GIB, 'activations': 3 * GIB},
)


def test_what_cannot_fit_is_refused_and_what_may_not_is_said():
    assert refusal('config.arms.a', STEP, 25 * GIB) == ''
    fault = refusal('config.arms.a', STEP, 24 * GIB)
    assert fault.startswith(
        'config.arms.a: expected a step of its training to keep at most the 24.0 GiB of a device, found 25.0: '
        'parameters 10.0, simulator 5.0, gradients 10.0 GiB. More devices split it (config.compute.mesh'
    )
    assert caution('a', STEP, 42 * GIB) == ''
    warning = caution('a', STEP, 40 * GIB)
    assert 'a step takes an estimated 37.0 of the 40.0 GiB of a device: parameters 10.0, simulator 5.0' in warning
    assert warning.endswith('config.compute.rows_in_flight has fewer conversations at once')
    apart = dataclasses.replace(STEP, sampling={'cache': 20 * GIB}, updating={}, mesh='config.compute.simulator_mesh')
    assert refusal('a', apart, GIB).endswith('More devices split it (config.compute.simulator_mesh.model)')
    assert caution('a', apart, 30 * GIB).endswith('config.compute.rows_in_flight has fewer conversations at once')
    update = dataclasses.replace(STEP, sampling={})
    assert "config.compute.training.remat='full'" in caution('a', update, 25 * GIB)


@pytest.mark.parametrize(('hosts', 'used'), [(['here'] * 4, 24), (['here', 'there'] * 2, 12)])
def test_processes_and_meshes_of_a_machine_share_its_memory(monkeypatch, capsys, hosts, used):
    """Each of four processes has four devices of one mesh and two of the other."""
    found = []
    told = {'the hosts': hosts, 'the memory of the devices': [30 * GIB, 26 * GIB, 30 * GIB, 30 * GIB]}
    monkeypatch.setattr(processes, 'count', lambda: 4)
    monkeypatch.setattr(processes, 'gather', lambda name, value: told[name])
    monkeypatch.setattr(socket, 'gethostname', lambda: 'here')
    monkeypatch.setattr(run_memory, 'device_limit', found.append)
    apart = dataclasses.replace(STEP, kept={'simulator': 26 * GIB}, mesh='config.compute.simulator_mesh', devices=8)
    own = dataclasses.replace(STEP, devices=16)
    with pytest.raises(
        ConfigError, match=r'at most the 26\.0 GiB .* found 36\.0: simulator 26.0.*simulator_mesh\.model'
    ):
        check_fits('a', [own, apart])
    assert found == [used]
    check_fits('a', [own, dataclasses.replace(apart, kept={}, sampling={'cache': 25 * GIB}, updating={})])
    assert capsys.readouterr().out.count('warning: a: ') == 2


def run_smoke(tmp_path, monkeypatch, limit, **options):
    monkeypatch.setattr(run_memory, 'device_limit', lambda used: limit)
    monkeypatch.setattr(experiment.stages, 'run_stages', lambda *_: pytest.fail('expected nothing to run'))
    config = quickstart.get_config('smoke')
    config.workers = 1
    experiment.run(config, tmp_path / 'run', **options)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r'^config\.arms\.role_play: expected a step of its training to keep at most'):
        run_smoke(tmp_path, monkeypatch, 2**10)
    assert not (tmp_path / 'run').exists()


def test_a_plan_is_of_other_machines(tmp_path, monkeypatch, capsys):
    run_smoke(tmp_path, monkeypatch, 2**10, show_plan=True)
    assert 'to run' in capsys.readouterr().out


def test_where_the_memory_is_unknown_the_run_says_so(tmp_path, monkeypatch, capsys):
    with pytest.raises(BaseException, match='expected nothing to run'):
        run_smoke(tmp_path, monkeypatch, None, only=('rl/role_play',))
    said = capsys.readouterr().out
    assert said.count('warning: config.arms.role_play: the memory of the devices is unknown') == 1  # for two seeds
    assert 'estimated memory of an RL step, each device: parameters ' in said


def test_the_papers_pair_fits_where_compiling_says_so():
    """Of `tools.compile_check`: 14B + 3B with 64 in flight take about 70 GiB of a v5p's 95.7 on 8 of them."""
    config = paper.get_config('sftuser-14b').to_dict()
    config['compute']['rows_in_flight'] = 64
    settings = experiment.settings_of(config)
    from tools.compile_check.architectures import PUBLISHED

    models = (PUBLISHED['Qwen/Qwen2.5-3B-Instruct'], PUBLISHED['Qwen/Qwen2.5-14B-Instruct'])
    estimate = functools.partial(
        step_memory,
        models[0],
        [Other('simulator', models[1], 'bfloat16')],
        [],
        settings=settings.rl,
        compute=settings.compute,
        limits=settings.conversation.limits,
        platform='tpu',
    )
    (eight,) = estimate(mesh=mesh_of(8, 1))
    assert sum(eight.most.values()) / GIB == pytest.approx(70, rel=0.1)
    assert sum({**eight.kept, **eight.updating}.values()) / GIB == pytest.approx(44.5, rel=0.1)
    assert refusal('a', eight, int(95.7 * GIB)) == ''
    assert refusal('a', *estimate(mesh=mesh_of(1, 1)), int(79 * GIB)).startswith('a: expected a step of its training')


def test_fits_keep_their_state():
    settings = experiment.settings_of(paper.get_config('sftuser-14b'))
    number = num_parameters(CONFIG)

    def fit(*settings_of_fit, **more):
        (found,) = fit_memory(CONFIG, *settings_of_fit, compute=settings.compute, **more)
        return found

    assert sum(fit(settings.user_sft.sft).least.values()) == pytest.approx(16 * number, abs=100)
    reward = fit(settings.reward_model.preference, heads=('reward_head',))
    assert sum(reward.least.values()) == pytest.approx(16 * (number + 17), abs=100)
    adapted = fit(dataclasses.replace(settings.user_sft.sft, lora=LoRASettings(rank=2, alpha=4.0)))
    assert adapted.kept['frozen'] == pytest.approx(2 * number, abs=4)
    assert adapted.kept['parameters'] < 2 * number


@pytest.mark.long
def test_every_process_refuses_what_does_not_fit(tmp_path):
    sizes = {'model_dim': 16384, 'num_layers': 64, 'num_heads': 128, 'num_kv_heads': 128, 'mlp_dim': 65536}
    flags = [f'--config.assistant.model.{name}={value}' for name, value in sizes.items()]
    layout = Layout(processes=2, devices=1, data=2, model=1)
    ended = many_devices.end(layout.start(tmp_path / 'run', '--config=configs/quickstart.py:smoke', *flags))
    for process in ended:
        assert process.code
        assert 'config.arms.role_play: expected a step of its training to keep at most the ' in process.errors
        assert 'parameters ' in process.errors
    assert not (tmp_path / 'run').exists()
