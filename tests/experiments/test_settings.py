"""A mesh on whatever devices a machine has: it is made, or the field to change is named."""

from types import SimpleNamespace

import jax
import pytest

from configs import concierge, quickstart, smollm2
from simrl.experiments import settings
from simrl.experiments.experiment import settings_of
from simrl.experiments.settings import Compute, MeshSettings, SimulatorMeshSettings
from simrl.models import sharding
from simrl.run.config import ConfigError, from_config_dict


class Device(int):
    """A device by its number, of a process."""

    process_index = 0


@pytest.fixture
def devices(monkeypatch):
    """Sets the numbers of devices and processes; a mesh is then its sizes and the numbers of its devices."""

    def give(number, processes=1):
        found = [Device(i) for i in range(number)]
        for device in found:
            device.process_index = device * processes // number
        monkeypatch.setattr(jax, 'device_count', lambda: number)
        monkeypatch.setattr(jax, 'devices', lambda: found)
        monkeypatch.setattr(jax, 'process_count', lambda: processes)
        monkeypatch.setattr(sharding, 'make_mesh', lambda *mesh: mesh)

    return give


@pytest.mark.parametrize('number', [1, 2, 4, 6, 8])
def test_data_defaults_to_all_devices_and_may_be_fewer(devices, number):
    devices(number)
    assert MeshSettings().make() == (number, 1, list(range(number)))
    assert MeshSettings(data=1).make() == (1, 1, [0])


def test_model_leaves_the_rest_to_data(devices):
    devices(8)
    assert MeshSettings(model=2).make() == (4, 2, list(range(8)))
    assert MeshSettings(data=2, model=2).make() == (2, 2, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ('mesh', 'number', 'processes', 'message'),
    [
        ((2, 1), 1, 1, r'expected at most 1 device, found 2 x 1'),
        ((None, 2), 1, 1, r'expected 1 device, found 1 x 2'),
        ((None, 3), 8, 1, r'expected 8 devices, found 2 x 3'),  # two would be unused, which nobody asked for
        ((1, 1), 8, 4, r'expected at most 8 devices, as many of each of the 4 processes, found 1 x 1'),
        ((None, 3), 8, 4, r'expected 8 devices, as many of each of the 4 processes, found 2 x 3'),
    ],
)
def test_a_mesh_that_the_devices_cannot_form_is_named(devices, mesh, number, processes, message):
    devices(number, processes)
    with pytest.raises(ConfigError, match=rf'^config\.compute\.mesh\.data x .*mesh\.model: {message}'):
        MeshSettings(*mesh).make()


def beside(mesh: MeshSettings, **settings):
    """The mesh of simulators beside the assistant's."""
    data, model, devices = mesh.make()
    assistants = SimpleNamespace(size=len(devices), shape={'data': data, 'model': model})
    return SimulatorMeshSettings(**settings).beside(assistants)


def test_simulators_have_the_same_devices_or_those_that_are_left(devices):
    devices(8)
    assert beside(MeshSettings(), model=8) == (1, 8, list(range(8)))
    assert beside(MeshSettings(model=8)) == (8, 1, list(range(8)))
    assert beside(MeshSettings(2), model=2) == (1, 2, [0, 1])
    assert beside(MeshSettings(2), model=2, devices='other') == (3, 2, [2, 3, 4, 5, 6, 7])
    assert beside(MeshSettings(2), data=1, model=4, devices='other') == (1, 4, [2, 3, 4, 5])
    devices(8, 2)
    assert beside(MeshSettings(), data=2, model=4) == (2, 4, list(range(8)))
    assert MeshSettings(4).make() == (4, 1, [0, 1, 4, 5])  # of each process
    assert beside(MeshSettings(4), model=2, devices='other') == (2, 2, [2, 3, 6, 7])
    assert beside(MeshSettings(2), data=4, devices='other') == (4, 1, [1, 2, 5, 6])


@pytest.mark.parametrize(
    ('mesh', 'own', 'processes', 'message'),
    [
        ((8,), {'data': 2, 'model': 2}, 1, r'the 8 devices of config\.compute\.mesh \(data=8 x model=1\), found 2 x 2'),
        ((4,), {'data': 2, 'model': 4}, 1, r'the 4 devices of config\.compute\.mesh \(.*\), found 2 x 4'),
        ((4,), {'model': 3}, 1, r'the 4 devices of .*, found 1 x 3'),
        ((), {'devices': 'other'}, 1, r'the 0 devices of 8 that are left by config\.compute\.mesh \(.*, found 1 x 1'),
        ((4,), {'data': 5, 'devices': 'other'}, 1, r'at most the 4 devices of 8 that are left by .*, found 5 x 1'),
        ((8,), {'devices': 'other'}, 2, r'the 0 devices of 8 .*, as many of each of the 2 processes, found 1 x 1'),
        (
            (4,),
            {'data': 3, 'devices': 'other'},
            2,
            r'at most the 4 devices of 8 .*, as many of each of .*, found 3 x 1',
        ),
    ],
)
def test_a_mesh_of_simulators_that_cannot_be_is_named(devices, mesh, own, processes, message):
    devices(8, processes)
    with pytest.raises(ConfigError, match=rf'^config\.compute\.simulator_mesh\..*{message}'):
        beside(MeshSettings(*mesh), **own)


def test_devices_that_form_no_mesh_are_named_by_field(devices, monkeypatch):
    def make_mesh(data, model, chips):
        if chips[0]:
            raise ValueError('mesh: expected TPUs that fill a block')
        return data, model, chips

    devices(8, 2)
    monkeypatch.setattr(sharding, 'make_mesh', make_mesh)
    with pytest.raises(ConfigError, match=r'^config\.compute\.simulator_mesh: expected TPUs that fill a block$'):
        beside(MeshSettings(4), devices='other')


def test_a_mesh_of_simulators_is_a_setting_of_its_own():
    found = from_config_dict(Compute, {'simulator_mesh': {'data': None, 'model': 4, 'devices': None}}, 'config.compute')
    assert found.simulator_mesh == SimulatorMeshSettings(model=4)
    assert Compute().mesh_of_simulators() is None
    with pytest.raises(ConfigError, match=r'^config\.compute\.simulator_mesh\.model: expected at least 1, found 0'):
        from_config_dict(Compute, {'simulator_mesh': {'model': 0}}, 'config.compute')


def test_programs_are_compiled_ahead_on_accelerators(monkeypatch):
    monkeypatch.setattr(settings, 'cpus', lambda: [0, 1, 2])
    for backend, expected in (('gpu', 3), ('cpu', 0)):
        monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
        assert Compute().threads_to_compile() == expected
        assert Compute(compile_threads=2).threads_to_compile() == 2


@pytest.mark.parametrize('field', ['data', 'model'])
def test_no_devices_are_refused(field):
    with pytest.raises(ConfigError, match=rf'^config\.compute\.mesh\.{field}: expected at least 1, found 0'):
        from_config_dict(MeshSettings, {field: 0}, 'config.compute.mesh')


@pytest.mark.parametrize('number', [1, 2, 3, 8])
@pytest.mark.parametrize(
    ('config', 'arg'),
    [
        (quickstart, ''),
        (quickstart, 'smoke'),
        (concierge, ''),
        (concierge, 'smoke'),
        (smollm2, 'cpu'),
        (smollm2, 'smoke'),
    ],
)
def test_configs_for_a_cpu_run_as_they_are_on_one_of_its_devices(devices, config, arg, number):
    devices(number)
    assert settings_of(config.get_config(arg)).compute.mesh.make() == (1, 1, [0])
