"""Checkpoints are whole or absent, and say so when they do not fit."""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simrl.models import checkpoint
from simrl.models.checkpoint import CheckpointError, Checkpoints
from simrl.run import stage_files


def make_state(seed: int = 0, rows: int = 4) -> dict[str, Any]:
    params = {'layers': {'query': jax.random.normal(jax.random.key(seed), (rows, 2))}, 'bias': jnp.zeros(())}
    return {
        'params': params,
        'opt_state': optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params),
        'nonfinite': jnp.int32(seed),
    }


def assert_equal(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_checkpoints_in_another_place(tmp_path: pathlib.Path) -> None:
    folder, disk = tmp_path / 'stage' / 'checkpoints', tmp_path / 'disk'
    with Checkpoints(folder, keep=1, elsewhere=f'{disk}/') as checkpoints:
        checkpoints.save(1, make_state(1), {})
    assert [path.name for path in folder.iterdir()] == ['place.json']
    (place,) = disk.iterdir()
    assert place.name.startswith('stage-')
    with Checkpoints(folder, keep=1) as checkpoints:  # wherever later ones would be
        assert_equal((checkpoints.restore(make_state()) or (None, None))[1], make_state(1))
        checkpoints.save(2, make_state(2), {})
    assert [path.name for path in place.iterdir()] == ['2']
    stage_files.remove_scratch(folder.parent)
    assert not place.exists()
    assert not folder.exists()
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    with Checkpoints(folder, keep=1, elsewhere=str(disk)) as checkpoints:
        assert checkpoints.steps == [1]
    assert not list(disk.iterdir())


def test_saves_and_restores_the_latest(tmp_path: pathlib.Path) -> None:
    meta = {'offsets': {'metrics.jsonl': 12}, 'totals': {'loss': [0.1 + 0.2, 3.0], 'nan': [float('nan'), 0.0]}}
    with Checkpoints(tmp_path / 'checkpoints', keep=2) as checkpoints:
        assert checkpoints.restore(make_state()) is None
        for step in (5, 10, 15):
            checkpoints.save(step, make_state(step), meta | {'step': step})
        with pytest.raises(CheckpointError, match='expected a step after 15, found 15'):
            checkpoints.save(15, make_state(15), {})
    with Checkpoints(tmp_path / 'checkpoints', keep=2) as checkpoints:
        assert checkpoints.steps == [10, 15]
        restored = checkpoints.restore(make_state())
        assert restored is not None
        step, state, found = restored
        assert step == found['step'] == 15
        assert found['totals']['loss'] == [0.1 + 0.2, 3.0]  # to the last bit
        assert np.isnan(found['totals']['nan'][0])
        assert_equal(state, make_state(15))
        abstract = jax.eval_shape(make_state)
        step, state, _ = checkpoints.restore(abstract, step=10) or (None, None, None)
        assert step == 10
        assert_equal(state, make_state(10))
        with pytest.raises(CheckpointError, match=r'expected a checkpoint of step 5, found steps \[10, 15\]'):
            checkpoints.restore(make_state(), step=5)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize('name', ['seeds=[0, 1]', 'back\\slash', 'st*r?'])
def test_any_name_of_a_folder(tmp_path: pathlib.Path, name: str) -> None:
    folder, state = tmp_path / name / 'params', make_state()
    for step in (1, 2):
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(step, state, {})
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.steps == [2]
        restored = checkpoints.restore(state)
    assert restored is not None
    assert_equal(restored[1], state)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # and no other folder


def test_another_state_is_refused_by_field(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(), {})
        other = make_state(rows=3) | {'value_head': jnp.zeros(2), 'nonfinite': jnp.float32(0)}
        del other['params']['bias']
        with pytest.raises(CheckpointError, match='the checkpoint has another structure') as error:
            checkpoints.restore(other)
        assert str(tmp_path / '1') in str(error.value)
        for part in (
            'params.layers.query: expected float32[3,2], found float32[4,2]',
            'value_head: expected float32[2], found nothing',
            'nonfinite: expected float32[], found int32[]',
            'params.bias: expected nothing, found float32[]',
        ):
            assert part in str(error.value)


def test_no_keys_and_no_plain_numbers(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(TypeError, match=r'state\.pair\.second: expected no random keys'):
            checkpoints.save(1, {'pair': Pair(jnp.zeros(1), jax.random.key(0))}, {})
        with pytest.raises(TypeError, match=r'state\.step: expected an array, found int'):
            checkpoints.save(1, {'step': 3}, {})


def test_what_a_kill_leaves_is_removed(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    half = tmp_path / '2.orbax-checkpoint-tmp'
    shutil.copytree(tmp_path / '1', half)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert not half.exists()
        assert checkpoints.steps == [1]
        checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps == [1, 2]


def test_a_damaged_checkpoint_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(2, make_state(2), {})
    for path in (tmp_path / '2' / 'state').rglob('*'):
        if path.is_file() and path.parent.name == 'd':
            os.truncate(path, path.stat().st_size // 2)
    message = rf'could not read {tmp_path / "2"}; delete that folder to resume'
    with Checkpoints(tmp_path, keep=2) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(make_state())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        monkeypatch.setattr(checkpoint.processes, 'count', lambda: 2)  # one of which may have been lost
        with pytest.raises(CheckpointError, match='if no process was lost, '):
            checkpoints.restore(make_state())
        monkeypatch.undo()
    shutil.rmtree(tmp_path / '2')
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        _, state, _ = checkpoints.restore(make_state()) or (None, None, None)
        assert_equal(state, make_state(1))


def test_too_little_space_is_known_before_writing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda _: usage._replace(free=10))
        with pytest.raises(CheckpointError, match=r'could not save step 2 in .*: the disk is full: expected \d+ bytes'):
            checkpoints.save(2, make_state(2), {})
        assert checkpoints.steps == [1]


SHARDED = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from simrl.models.checkpoint import Checkpoints

mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
with Checkpoints(pathlib.Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(1, {'query': jnp.arange(8.0)}, {})
    wanted = {'query': jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)}
    _, state, _ = checkpoints.restore(wanted)
assert state['query'].sharding == split
assert [shard.data.tolist() for shard in state['query'].addressable_shards] == [[0, 1, 2, 3], [4, 5, 6, 7]]
"""


def test_restores_into_the_shardings_asked_for(tmp_path: pathlib.Path) -> None:
    """In a process of its own, with two devices."""
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
    subprocess.run([sys.executable, '-c', SHARDED, str(tmp_path)], env=environment, check=True, timeout=120)
