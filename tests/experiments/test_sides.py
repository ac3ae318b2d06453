"""An RL stage on four devices and on eight: what it keeps there, and a mesh for each side, which changes no result."""

import json
import pathlib
from typing import Any

import pytest

from simrl.experiments.memory import MESH, SIMULATOR_MESH
from tests import many_devices
from tests.experiments import sides
from tests.experiments.test_pretrained import files  # noqa: F401  (a fixture)

DEVICES_DECIDE = ('time/', 'rollout/useful_steps')  # or the clock


def found(files: pathlib.Path, out: pathlib.Path, dtype: str, *layouts: str) -> dict[str, Any]:  # noqa: F811
    many_devices.run(sides.__name__, str(files), str(out), dtype, *layouts)
    results: dict[str, Any] = json.loads((out / f'{dtype}.json').read_text())
    return results


@pytest.mark.long
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_model_is_kept_twice(files: pathlib.Path, tmp_path: pathlib.Path, dtype: str) -> None:  # noqa: F811
    """While conversations are held, and after an update: no float32 copy of what is sampled or scored in bfloat16."""
    (result,) = found(files, tmp_path, dtype, 'one').values()
    print(json.dumps({name: result[name] for name in ('bytes', 'live')}))
    assert result['more'] == result['less'] == {'conversations': [], 'update': []}
    assert result['live']['conversations'] == sum(result['bytes'].values())


@pytest.mark.long
def test_a_mesh_for_each_side(files: pathlib.Path, tmp_path: pathlib.Path) -> None:  # noqa: F811
    one, *others = found(files, tmp_path, 'float32', 'one', 'same', 'other').values()
    for other in others:
        assert len(other['said']) == len(one['said']) == 16
        for pair in zip(other['said'], one['said'], strict=True):
            new, expected = map(json.loads, pair)
            assert new['messages'] == expected['messages']
            assert new['reward'] == pytest.approx(expected['reward'], rel=1e-5, abs=1e-5)
        for line, expected in zip(other['lines'], one['lines'], strict=True):
            for name in [name for name in expected if not name.startswith(DEVICES_DECIDE)]:
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
        assert other['more'] == {'conversations': [], 'update': []}
        assert other['bytes']['simulator'] < one['bytes']['simulator'] / 2
    same, other = others
    assert same['estimate'].keys() == {MESH}
    assert other['estimate'].keys() == {MESH, SIMULATOR_MESH}
    assert 'simulator' not in other['estimate'][MESH]
    for found_there in (same['estimate'][MESH], other['estimate'][SIMULATOR_MESH]):
        assert found_there['simulator'] == pytest.approx(same['bytes']['simulator'], rel=0.03)  # vectors too
