"""RL, fine-tuning and preference steps on eight and four fake devices against one, in processes of their own."""

import dataclasses
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests import many_devices
from tests.rl import eight_devices

# By mesh, data x model; the two key/value heads are split by the first, whole in the second, which has four of the
# devices. Adapters and heads of reward models are laid out by the same rules on both.
QUICK = {'4x2': ('reinforce',)}
LONG = {
    '4x2': ('adapt', 'foresee_ahead', 'fine_tune', 'fit', 'ahead', 'ahead_at_own_pace'),
    '1x4': ('reinforce', 'fine_tune', 'ahead', 'ahead_at_own_pace'),
}
STATIC, OWN_PACE = {'start_dialogue', 'add_message'}, {'decode_block', 'feed_rows', 'move_rows'}
UPDATE = {'trajectories', 'start_passes', 'add_passes', 'add_gradients', 'minibatch_step'}
AHEAD = {  # programs that are compiled before the first step
    'ahead': STATIC | UPDATE,
    'ahead_at_own_pace': OWN_PACE | UPDATE,
    'foresee_ahead': STATIC | UPDATE | {'add_recorded', 'end_running'},
    'fine_tune': {'train_step', 'eval_step'},
    'fit': {'train_step'},
}
EACH = pytest.mark.parametrize(
    ('training', 'mesh'),
    [
        *((x, mesh) for mesh, xs in QUICK.items() for x in xs),
        *(pytest.param(x, mesh, marks=pytest.mark.long) for mesh, xs in LONG.items() for x in xs),
    ],
)


@dataclasses.dataclass(frozen=True)
class Found:
    """Output of `eight_devices.py`: `results.json`, and by training its arrays by name."""

    results: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray]]


Finder = Callable[[bool], dict[str, Found]]


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> Finder:
    """Whether long -> what was found, by mesh. Compiling is nearly all of the time, so they run side by side."""

    @functools.cache
    def of(long: bool) -> dict[str, Found]:
        trainings = LONG if long else QUICK
        trainings = {'1x1': sorted({x for xs in trainings.values() for x in xs}), **trainings}
        folders = {mesh: tmp_path_factory.mktemp(mesh) for mesh in trainings}

        def train(mesh: str) -> None:
            many_devices.run(eight_devices.__name__, *mesh.split('x'), str(folders[mesh]), *trainings[mesh])

        with ThreadPoolExecutor(len(folders)) as threads:
            list(threads.map(train, folders))  # raises what one raised
        return {
            mesh: Found(
                json.loads((folder / 'results.json').read_text()),
                {path.stem: dict(np.load(path)) for path in folder.glob('*.npz')},
            )
            for mesh, folder in folders.items()
        }

    return of


@EACH
def test_two_steps_are_those_of_one_device(found: Finder, training: str, mesh: str) -> None:
    """Up to the order of float32 sums; at a rate of 1e-2 params move by 1e-3 and more."""
    runs = found(training in LONG[mesh])
    arrays, expected = (runs[name].arrays[training] for name in (mesh, '1x1'))
    assert arrays.keys() == expected.keys()
    tokens = [name for name in arrays if name.startswith('tokens')]
    assert (len(tokens) >= 2) == (training in eight_devices.SCORED)
    for name in arrays:
        if name in tokens:
            np.testing.assert_array_equal(arrays[name], expected[name])
        else:
            np.testing.assert_allclose(arrays[name], expected[name], atol=5e-6, err_msg=name)
    lines, expected_lines = (runs[name].results[training]['lines'] for name in (mesh, '1x1'))
    assert lines == [pytest.approx(line, rel=1e-5, abs=1e-5) for line in expected_lines]
    assert max(line.get('update_norm', 0) for line in lines) > 1e-2


@EACH
def test_params_and_moments_are_split_after_the_second_step(found: Finder, training: str, mesh: str) -> None:
    data, model = (int(size) for size in mesh.split('x'))
    kv = 2 // model if 2 % model == 0 else 2  # whole where the axis does not divide them
    expected = {
        'decoder.embedding': [384 // model, 32 // data],
        'layers.query': [2, 32 // data, 4 // model, 8],
        'layers.key': [2, 32 // data, kv, 8],
        'layers.output': [2, 4 // model, 8, 32 // data],
        'layers.down': [2, 48 // model, 32 // data],
        'decoder.final_norm': [32],
    }
    if training == 'adapt':
        expected = {
            'query.a': [2, 32 // data, 2],
            'query.b': [2, 2, 4 // model, 8],
            'key.b': [2, 2, kv, 8],
            'output.a': [2, 4 // model, 8, 2],
            'output.b': [2, 2, 32 // data],
            'gate.b': [2, 2, 48 // model],
            'down.a': [2, 48 // model, 2],
        }
    heads = dict.fromkeys(eight_devices.SCORED, 'value_head') | {'fit': 'reward_head'}
    head = heads.get(training)
    expected |= {f'{head}.kernel': [32]} if head else {}
    shards = found(training in LONG[mesh])[mesh].results[training]['shards']
    for what in ('params', 'mu', 'nu'):
        assert {name: shards[what].get(name) for name in expected} == expected, what
    assert shards['params'] == shards['mu'] == shards['nu']


def test_a_model_is_loaded_and_placed_without_being_whole_anywhere(found: Finder) -> None:
    """On 4 x 2 devices; its vocabulary grew by the terminal token, to four times 128."""
    result = found(False)['4x2'].results['loaded']
    for what in ('loaded', 'made'):
        assert result['shards'][what]['decoder.embedding'] == [256, 8]
        assert result['shards'][what]['layers.query'] == [2, 8, 2, 8]
    assert result['training_embedding'] == [256, 8]
    assert result['sampling_embedding'] == [256, 32]
    assert result['whole'] == []
    assert result['read_by_host'] == []
    assert result['same']


@EACH
def test_the_second_step_compiles_nothing(found: Finder, training: str, mesh: str) -> None:
    first, second = found(training in LONG[mesh])[mesh].results[training]['compiles']
    assert (first > 0) == (training not in ('fine_tune', 'fit'))  # where all is compiled before
    assert second == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ('training', 'mesh'),
    [(x, mesh) for mesh, of_mesh in {'1x1': AHEAD, **LONG}.items() for x in AHEAD if x in of_mesh],
)
def test_what_is_compiled_ahead_is_what_is_called(found: Finder, training: str, mesh: str) -> None:
    """Nothing of it is compiled again; its parts on several devices are known from shapes."""
    names = found(True)[mesh].results[training]['names']
    at = names.index(eight_devices.FIRST_STEP)
    ahead, later = set(names[:at]), set(names[at:])
    moving = {'replicated', 'extend_cache', 'gather_rows', 'scatter_rows', 'empty_cache', 'take_rows'}
    expected = {f'jit({name})' for name in AHEAD[training]}
    assert expected <= ahead
    assert not ahead & later & (expected | {f'jit({name})' for name in moving})
