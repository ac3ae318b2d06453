"""A mesh on whatever devices a machine has: it is made, or the field to change is named."""

import jax
import pytest

from configs import concierge, quickstart, smollm2
from simrl.experiments.experiment import settings_of
from simrl.experiments.settings import MeshSettings
from simrl.models import sharding
from simrl.run.config import ConfigError, from_config_dict


@pytest.fixture
def devices(monkeypatch):
    """Sets the numbers of devices and processes; a mesh is then its sizes and the numbers of its devices."""

    def give(number, processes=1):
        monkeypatch.setattr(jax, 'device_count', lambda: number)
        monkeypatch.setattr(jax, 'devices', lambda: list(range(number)))
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
        ((2, 1), 1, 1, r'expected at most 1 devices, found 2 x 1'),
        ((None, 2), 1, 1, r'expected 1 devices, found 1 x 2'),
        ((None, 3), 8, 1, r'expected 8 devices, found 2 x 3'),  # two would be unused, which nobody asked for
        ((1, 1), 8, 4, r'expected 8 devices in 4 processes, found 1 x 1'),
    ],
)
def test_a_mesh_that_the_devices_cannot_form_is_named(devices, mesh, number, processes, message):
    devices(number, processes)
    with pytest.raises(ConfigError, match=rf'^config\.compute\.mesh\.data x .*mesh\.model: {message}'):
        MeshSettings(*mesh).make()


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
