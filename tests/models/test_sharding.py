"""Sharding rules, and eight fake devices against one (in a process of its own: the device count is fixed at start)."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from simrl.models import lora, placement, sharding
from simrl.models.layouts import MATRICES
from simrl.models.lora import LoRASettings
from simrl.models.transformer import TransformerConfig
from tests import many_devices

CONFIG = TransformerConfig(
    vocab_size=150, model_dim=32, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=4, mlp_dim=48, max_positions=64
)


def shape_only(data, model):
    """A mesh without devices; the rules need its shape alone."""
    return jax.sharding.AbstractMesh((data, model), ('data', 'model'), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize('qk_norm', ['head', 'all_heads'])
def test_every_parameter_has_axes_for_its_dimensions(qk_norm):
    config = TransformerConfig(**{**CONFIG.__dict__, 'biases': tuple(MATRICES), 'qk_norm': qk_norm})
    axes = sharding.logical_axes(config, ('value_head', 'reward_head'), tuple(lora.TARGETS))
    settings = LoRASettings(rank=3, alpha=6.0, targets=tuple(lora.TARGETS))
    shapes = jax.eval_shape(
        lambda: (
            sharding.init_sharded(
                jax.random.key(0),
                config,
                sharding.make_mesh(1, 1, jax.devices()[:1]),
                sharding.TRAINING_RULES,
                ('value_head', 'reward_head'),
            )
            | {'adapters': lora.init(jax.random.key(0), config, settings), 'adapter_scale': jnp.float32(2)}
        )
    )
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    ranks = jax.tree.map(len, axes, is_leaf=is_axes)
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, shapes)
    used = {axis for leaf in jax.tree.leaves(axes, is_leaf=is_axes) for axis in leaf}
    for rules in (sharding.TRAINING_RULES, sharding.SAMPLING_RULES):
        assert used == {name for name, _ in rules}  # no rule without a parameter, none missing


@pytest.mark.parametrize('missing', ['vocab', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'norm', 'layers'])
def test_parameter_without_a_rule(missing):
    rules = tuple(rule for rule in sharding.TRAINING_RULES if rule[0] != missing)
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    with pytest.raises(ValueError, match=f'no sharding rule for its logical axis {missing!r}'):
        sharding.param_shardings(CONFIG, mesh, rules)


def test_axis_with_two_rules():
    with pytest.raises(ValueError, match="found two for 'mlp'"):
        sharding.param_shardings(CONFIG, shape_only(1, 1), (*sharding.TRAINING_RULES, ('mlp', 'data')))


@pytest.mark.parametrize(
    ('data', 'model', 'change', 'message'),
    [
        (1, 3, {'vocab_size': 384}, 'num_heads=8'),
        (1, 8, {'mlp_dim': 44}, 'mlp_dim=44'),
        (1, 3, {'num_heads': 6, 'num_kv_heads': 3}, 'padded vocab_size=256'),
        (5, 1, {}, 'model_dim=32'),
    ],
)
def test_dimensions_that_do_not_divide(data, model, change, message):
    config = TransformerConfig(**{**CONFIG.__dict__, **change})
    with pytest.raises(ValueError, match=f'expected a divisor of .*{message}'):
        sharding.param_shardings(config, shape_only(data, model), sharding.TRAINING_RULES)


def test_mesh_that_is_not_the_devices():
    with pytest.raises(ValueError, match=r'expected data \* model = \d+ devices, found data=3, model=5'):
        sharding.make_mesh(3, 5)


@dataclasses.dataclass(frozen=True)
class Absent:
    """A device that is not here, as far as the layout of a mesh asks."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0


def slice_of(kind, shape, index=0):
    """The chips of a slice, its first side running fastest."""
    places = [place[::-1] for place in itertools.product(*map(range, (*shape, 1, 1)[2::-1]))]
    return [Absent(number, 'tpu', kind, place, slice_index=index) for number, place in enumerate(places)]


@pytest.mark.parametrize(
    ('kind', 'shape', 'data', 'model'),
    [
        ('TPU v6 lite', (8, 8), 16, 4),
        ('TPU v6 lite', (4, 4), 8, 2),
        ('TPU v5 lite', (8, 8), 16, 4),
        ('TPU v5', (4, 4, 4), 32, 2),
    ],
)
def test_a_side_of_a_slice_is_split_between_both_axes(kind, shape, data, model):
    chips = slice_of(kind, shape)
    mesh = sharding.make_mesh(data, model, chips)
    assert (mesh.axis_names, mesh.devices.shape) == (('data', 'model'), (data, model))
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(data * model))
    for row in mesh.devices:  # each is a link away from the one before it
        places = np.array([chip.coords for chip in row])
        assert (np.abs(np.diff(places, axis=0)).sum(axis=1) == 1).all()


def test_tpus_that_form_no_block_keep_their_order():
    """Two of each host's four."""
    chips, flat = (
        [chip for chip in slice_of(kind, shape) if chip.coords[1] % 2 == 0]
        for kind, shape in (('TPU v5', (2, 4, 2)), ('TPU v6 lite', (4, 4)))
    )
    assert list(sharding.make_mesh(4, 2, chips).devices.flat) == chips
    with pytest.raises(
        ValueError, match=r'^mesh: expected TPUs that fill a block of their slice, found 8 that do not$'
    ):
        sharding.make_mesh(4, 2, flat)


def test_devices_of_a_host_have_the_same_rows():
    """JAX states each host's GPUs as a slice of their own."""
    gpus = [Absent(number, 'gpu', 'H100', slice_index=number // 8, process_index=number // 8) for number in range(16)]
    mesh = sharding.make_mesh(4, 4, gpus)
    assert [{gpu.process_index for gpu in row} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_tpus_of_several_slices_are_one_line():
    chips = [chip for index in (0, 1) for chip in slice_of('TPU v6 lite', (2, 2), index)]
    with pytest.raises(ValueError, match=r'^mesh: expected TPUs of one slice, found those of 2$'):
        sharding.make_mesh(4, 2, chips)


def test_batch_that_does_not_divide_and_scalars():
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    batch = placement.shard_batch({'tokens': np.zeros((3, 4), np.int32)}, mesh)
    assert batch['tokens'].shape == (3, 4)
    with pytest.raises(ValueError, match=r"batch\['step'\]: expected a number of rows"):
        placement.shard_batch({'step': np.int32(3)}, mesh)


@pytest.fixture(scope='module')
def eight_devices(tmp_path_factory):
    """The results of `eight_devices.py`: a JSON object."""
    out = tmp_path_factory.mktemp('eight_devices')
    many_devices.run('tests.models.eight_devices', str(out))
    return json.loads((out / 'results.json').read_text())


MESHES = ['4x2', '2x4']  # data x model; the two key/value heads are split by the first, whole in the second


@pytest.mark.parametrize('mesh', MESHES)
def test_eight_devices_compute_what_one_does(eight_devices, mesh):
    result = eight_devices[mesh]
    assert result['init_difference'] < 1e-6
    assert result['logits_difference'] < 1e-5
    assert result['gradient_difference'] < 1e-5
    assert result['decoded'] == result['decoded_apart'] == eight_devices['1x1']['decoded']


def test_log_probs_on_a_mesh_are_those_of_one_device(eight_devices):
    """Also where `data` has one device and `model` more."""
    differences = eight_devices['log_probs']
    assert set(differences) == {'1x2', '2x2'}
    assert max(differences.values()) < 1e-5


def test_attention_on_a_mesh_is_that_of_one_device(eight_devices):
    """With key/value heads split over `model`; whole, where a device reads one; and whole, where it reads several."""
    differences = eight_devices['attention']
    assert len(differences) == 3
    assert max(differences.values()) < 1e-5


def test_tokens_are_drawn_from_split_logits(eight_devices):
    """With and without filters, greedily, and by each row's settings, without sending logits."""
    ((mesh, result),) = eight_devices['sampling'].items()
    rows = 512 // int(mesh[0])
    assert result['sent']
    assert max(math.prod(shape) for shape in result.pop('sent')) <= rows * 128  # a block of each row
    for name, difference in result.items():
        assert difference < (1e-5 if name.endswith(('log_prob', 'weights')) else 1), name


@pytest.mark.parametrize('mesh', MESHES)
def test_shards_are_really_split(eight_devices, mesh):
    data, model = (int(size) for size in mesh.split('x'))
    kv = 2 // model if 2 % model == 0 else 2  # whole where the axis does not divide them
    expected = {
        'embedding': [256 // model, 32 // data],
        'head': [256 // model, 32 // data],
        'query': [2, 32 // data, 8 // model, 4],
        'key': [2, 32 // data, kv, 4],
        'value_bias': [2, kv, 4],
        'output_bias': [2, 32],
        'query_norm': [2, 8 // model, 4],
        'key_norm': [2, kv, 4],
        'output': [2, 8 // model, 4, 32 // data],
        'gate': [2, 32 // data, 48 // model],
        'down': [2, 48 // model, 32 // data],
        'attention_norm': [2, 32],
    }
    result = eight_devices[mesh]
    for source in ('init', 'loaded', 'placed', 'gradient', 'moments'):
        assert {name: result['training_shards'][source][name] for name in expected} == expected, source
    for name in ('embedding', 'query', 'key', 'output', 'gate', 'down'):
        sampling = [
            32 if part == 32 // data and whole == 32 else part
            for part, whole in zip(expected[name], result['shapes'][name], strict=True)
        ]
        assert result['sampling_shards'][name] == sampling
    outputs_first = {
        'head': [256 // model, 32],
        'query': [8 // model, 4, 32],
        'key': [kv, 4, 32],
        'value_bias': [kv, 4],
        'output_bias': [32],
        'query_norm': [8 // model, 4],
        'output': [32, 8 // model, 4],
        'gate': [48 // model, 32],
        'down': [32, 48 // model],
    }
    assert {name: result['apart_shards'][name] for name in outputs_first} == outputs_first
    assert result['batch_shard'] == [8 // data, 12]


@pytest.mark.parametrize('mesh', MESHES)
def test_shards_are_read_written_and_resized_as_whole_arrays_are(eight_devices, mesh):
    result = eight_devices[mesh]
    assert result['loaded_equal']
    assert result['exported_equal']
    data, model = (int(size) for size in mesh.split('x'))
    assert result['resized_embedding_shard'] == [384 // model, 32 // data]
    assert result['resized_row_equal']


@pytest.mark.parametrize('mesh', MESHES)
def test_sampling_gathers_no_weight(eight_devices, mesh):
    result = eight_devices[mesh]
    assert not [shape for _, shape in result['sent_in_decode'] if shape[:1] == [8]]  # nothing of all rows
    assert result['gathered_in_decode'] < eight_devices['smallest_matrix']
    assert result['gathered_in_decode_by_training_rules'] >= eight_devices['smallest_matrix']


@pytest.mark.parametrize('mesh', MESHES)
def test_each_device_caches_its_rows_and_one_head(eight_devices, mesh):
    """Four devices, too, share two key/value heads: each is on two of them."""
    rows = 8 // int(mesh[0])
    of_key, of_value = [rows, 1, 4, 6], [rows, 1, 6, 4]
    assert eight_devices[mesh]['cache_shards'] == [of_key] * 2 + [of_value] * 2


@pytest.mark.parametrize('mesh', MESHES)
def test_training_splits_rows_and_gathers_weights(eight_devices, mesh):
    """FSDP as meant: weights are gathered, and no device sees the activations of all 8 rows of 12 tokens.

    (Embeddings are looked up for all rows where they lie, a slice of their dimensions on each device, then exchanged.)
    """
    sent = eight_devices[mesh]['sent_in_gradient']
    data, model = (int(size) for size in mesh.split('x'))
    assert not [shape for shape in sent if shape[:2] == [8, 12] and math.prod(shape[2:]) > 32 // data]
    assert [32, 48 // model] in sent  # gate and up, gathered over `data`
