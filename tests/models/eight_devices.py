"""Run by `test_sharding.py` in a process of eight fake devices; writes what it finds to `results.json`."""

import functools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simrl.models import placement, sharding
from simrl.models.attention import causal_attention
from simrl.models.files.export import export
from simrl.models.files.huggingface import load_params
from simrl.models.files.load import resize_vocabulary
from simrl.models.log_probs import token_log_probs
from simrl.models.transformer import Execution, TransformerConfig, apply, apply_head, init_cache, project
from simrl.rollouts.token_sampling import Draw, sample_rows, sample_token
from tests.many_devices import collectives

CONFIG = TransformerConfig(
    vocab_size=150,
    model_dim=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=48,
    max_positions=64,
    norm_placement='after',
    qk_norm='all_heads',
    biases=('query', 'key', 'value', 'output'),
)
HEADS = ('value_head',)
BATCH = {'tokens': np.random.default_rng(0).integers(0, 150, (8, 12)).astype(np.int32)}
NUM_DECODED = 6


def loss(params, batch):
    hidden, _ = apply(params, CONFIG, Execution(remat='full'), batch['tokens'])
    log_probs = jax.nn.log_softmax(project(params, hidden)[:, :-1, :150])
    chosen = jnp.take_along_axis(log_probs, batch['tokens'][:, 1:, None], -1)
    return jnp.mean(jnp.square(chosen)) + jnp.mean(jnp.square(apply_head(params['value_head'], hidden) - 1))


@jax.jit
def logits_of(params, batch):
    return project(params, apply(params, CONFIG, Execution(), batch['tokens'])[0])


def decode_step(params, token, position, cache):
    hidden, cache = apply(params, CONFIG, Execution(), token[:, None], position[:, None], cache)
    return jnp.argmax(project(params, hidden)[:, 0, :150], axis=-1).astype(jnp.int32), cache


@jax.jit
def decode(params, batch):
    """Greedy tokens after the first of each row, and the cache."""

    def step(carry, position):
        token, cache = carry
        token, cache = decode_step(params, token, jnp.full(token.shape, position), cache)
        return (token, cache), token

    cache = init_cache(CONFIG, 8, NUM_DECODED, 'float32')
    (_, cache), tokens = jax.lax.scan(step, (batch['tokens'][:, 0], cache), jnp.arange(NUM_DECODED))
    return tokens.T, cache


def shard_shapes(params):
    """The shape of one device's part of each array, checked on the arrays themselves, by the last key on its path."""
    shapes = {}
    for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts = {shard.data.shape for shard in array.addressable_shards}
        assert len(parts) == 1
        shapes[[entry.key for entry in path if hasattr(entry, 'key')][-1]] = list(parts.pop())
    return shapes


def sent_in_decode(params, batch):
    return collectives(decode.lower(params, batch).compile().as_text())


def largest_gather(sent):
    """Elements of the largest array that a program gathers."""
    return max((math.prod(shape) for kind, shape in sent if kind == 'all-gather'), default=0)


def difference(tree, expected):
    scale = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
    return (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - b))), tree, expected)))
        / scale
    )


def equal(tree, expected):
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), tree, expected)))


def main(out):
    key = jax.random.key(1)
    one = sharding.make_mesh(1, 1, jax.devices()[:1])
    params = sharding.init_sharded(key, CONFIG, one, sharding.TRAINING_RULES, HEADS)
    gradient = jax.device_get(jax.jit(jax.grad(loss))(params, BATCH))
    logits, decoded = jax.device_get((logits_of(params, BATCH), decode(params, BATCH)[0]))
    expected = jax.device_get(params)
    export(params, CONFIG, None, out / 'model')
    from_host = load_params(out / 'model', CONFIG)
    results = {'1x1': {'decoded': decoded.tolist()}}
    matrices = [
        leaf.size // CONFIG.num_layers for leaf in jax.tree.leaves(expected['decoder']['layers']) if leaf.ndim > 3
    ]
    results['smallest_matrix'] = min(matrices)

    results['log_probs'] = {f'{data}x{model}': log_probs_difference(data, model) for data, model in ((1, 2), (2, 2))}
    results['attention'] = {
        f'{data}x{model}, {heads} heads read {kv_heads}': attention_difference(data, model, heads, kv_heads)
        for data, model, heads, kv_heads in ((2, 2, 4, 2), (2, 4, 8, 2), (1, 2, 6, 3))
    }
    results['sampling'] = {'2x4': sampling_differences(2, 4)}
    for data, model in ((4, 2), (2, 4)):
        mesh = sharding.make_mesh(data, model)
        with jax.set_mesh(mesh):
            results[f'{data}x{model}'] = on_mesh(mesh, key, expected, gradient, logits, out / 'model', from_host)
    (out / 'results.json').write_text(json.dumps(results))


def log_probs_difference(data, model):
    """Of the gradient of log-probabilities and entropies on a mesh, from that without one."""
    random = np.random.default_rng(1)
    hidden, weights = (random.normal(size=shape).astype(np.float32) for shape in ((4, 6, 16), (32, 16)))
    targets, trained = random.integers(0, 32, (4, 6)), random.random((4, 6)) < 0.5

    def total(hidden, weights):
        params = {'decoder': {'embedding': weights}}
        found = token_log_probs(params, hidden, targets, trained, np.ones(32, bool), chunk=5)
        return sum(jnp.sum(jnp.square(x)) for x in found)

    gradient = jax.grad(total, argnums=(0, 1))
    expected = jax.device_get(gradient(hidden, weights))
    mesh = sharding.make_mesh(data, model, jax.devices()[: data * model])
    with jax.set_mesh(mesh):
        shardings = [jax.NamedSharding(mesh, jax.P(*axes)) for axes in (('data',), ('model', 'data'))]
        placed = sharding.shard([hidden, weights], shardings)
        return difference(jax.jit(gradient, out_shardings=tuple(shardings))(*placed), expected)


def attention_difference(data, model, heads, kv_heads):
    """Of the result and the gradients of attention by blocks on a mesh, from those of whole rows without one."""
    random = np.random.default_rng(2)
    arrays = [random.normal(size=(4, 20, n, 8)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]

    def both(implementation):
        def total(*arrays):
            mixed = causal_attention(*arrays, implementation)
            return jnp.sum(jnp.square(mixed)), mixed

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))

    expected = jax.device_get(both('xla')(*arrays))
    mesh = sharding.make_mesh(data, model, jax.devices()[: data * model])
    with jax.set_mesh(mesh):
        kv_axis = 'model' if kv_heads % model == 0 else None
        shardings = [jax.NamedSharding(mesh, jax.P('data', None, axis)) for axis in ('model', kv_axis, kv_axis)]
        compiled = both('chunked').lower(*sharding.shard(arrays, shardings)).compile()
        # Rows and heads are where they belong: devices exchange gradients of shared heads, and the sum of the loss.
        assert not [kind for kind, _ in collectives(compiled.as_text()) if kind != 'all-reduce']
        return difference(compiled(*sharding.shard(arrays, shardings)), expected)


VOCABULARY = 640  # five blocks of 128: borders between devices are not borders of blocks
FILTERS = {'all': {}, 'filtered': {'top_k': 60, 'top_p': 0.9, 'min_p': 0.01}}


def sampling_differences(data, model):
    """Tokens drawn from split logits that differ from those of one device, by filters, and what is sent for them.

    Rows' numbers are on the borders between tokens, where the last bit of a sum decides.
    """
    random = np.random.default_rng(3)
    logits = (3 * random.standard_normal((512, VOCABULARY))).astype(np.float32)
    mask = random.random(VOCABULARY) < 0.8
    prob = np.exp(np.where(mask, logits, -np.inf).astype(np.float64))
    borders = np.cumsum(prob, axis=1) / prob.sum(1, keepdims=True)
    borders = borders[np.arange(512), random.integers(0, VOCABULARY, 512)]
    on_border, anywhere = np.clip(borders, 0, 1 - 2**-24).astype(np.float32), random.random(512, np.float32)
    mesh = sharding.make_mesh(data, model)
    tokens, rows = (jax.NamedSharding(mesh, jax.P('data', *axes)) for axes in (('model',), ()))
    temperature = (np.arange(512) % 3).astype(np.float32)
    results = {'sent': []}

    def compare(name, function, *arrays):
        expected = jax.device_get(jax.jit(function)(logits, *arrays))
        with jax.set_mesh(mesh):
            placed = sharding.shard([logits, *arrays], [tokens, *[rows] * len(arrays)])
            compiled = jax.jit(function).lower(*placed).compile()
            found = jax.device_get(compiled(*placed))
        results['sent'] += [shape for _, shape in collectives(compiled.as_text())]
        if isinstance(found, Draw):
            results[f'{name} weights'] = difference(
                (found.weight, found.log_total), (expected.weight, expected.log_total)
            )
            found, expected = ((x.token, x.log_prob) for x in (found, expected))
        results[name] = int(np.sum(found[0] != expected[0]))
        results[f'{name} log_prob'] = float(np.max(np.abs(found[1] - expected[1])))

    for name, filters in FILTERS.items():
        uniform = anywhere if filters else on_border  # devices add up shares in another order
        compare(name, lambda *arrays, of=filters: sample_token(arrays[0], mask, arrays[1], 1.0, **of), uniform)
    compare('greedy', lambda *arrays: sample_token(arrays[0], mask, arrays[1], 0.0), anywhere)
    settings = [np.full(512, x, dtype) for x, dtype in ((60, np.int32), (0.9, np.float32), (0.01, np.float32))]
    allowed = np.broadcast_to(mask, logits.shape)
    compare('rows', lambda x, u, t, *of: sample_rows(x, allowed, u, t, *of), anywhere, temperature, *settings)
    return results


def on_mesh(mesh, key, expected, gradient, logits, folder, from_host):
    rules = sharding.TRAINING_RULES
    training = sharding.param_shardings(CONFIG, mesh, rules, HEADS)
    sampling = sharding.param_shardings(CONFIG, mesh, sharding.SAMPLING_RULES, HEADS)
    params = sharding.init_sharded(key, CONFIG, mesh, rules, HEADS)
    batch = placement.shard_batch(BATCH, mesh)
    placing = functools.partial(sharding.param_shardings, CONFIG, mesh, rules)
    loaded = load_params(folder, CONFIG, shardings=placing)
    gradient_step = jax.jit(jax.grad(loss), out_shardings=training).lower(params, batch).compile()
    sharded_gradient = gradient_step(params, batch)
    optimizer = optax.adam(1e-3)
    state_shardings = sharding.state_shardings(jax.eval_shape(optimizer.init, params), params, training)
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(params)
    assert state[0].count.is_fully_replicated
    for_sampling = jax.jit(lambda x: x, out_shardings=sampling)(params)
    apart = placement.for_sampling(CONFIG, 'float32', mesh)(params)
    exported = folder.with_name(f'exported-{mesh.shape["data"]}')
    export(loaded, CONFIG, None, exported)
    resized, _ = resize_vocabulary(params, CONFIG, 257, copy_from=3)
    sent = [*sent_in_decode(for_sampling, batch), *sent_in_decode(apart, batch)]
    tokens, cache = decode(apart, batch)
    return {
        'init_difference': difference(params, expected),
        'exported_equal': equal(load_params(exported, CONFIG), from_host),
        'resized_embedding_shard': shard_shapes(resized)['embedding'],
        'resized_row_equal': np.array_equal(*np.asarray(resized['decoder']['embedding'])[[256, 3]]),
        'loaded_equal': equal(loaded, from_host),
        'logits_difference': difference(logits_of(params, batch), logits),
        'gradient_difference': difference(sharded_gradient, gradient),
        'sent_in_gradient': [list(shape) for _, shape in collectives(gradient_step.as_text())],
        'decoded': np.asarray(decode(for_sampling, batch)[0]).tolist(),
        'decoded_apart': np.asarray(tokens).tolist(),
        'cache_shards': [list(x.addressable_shards[0].data.shape) for x in (*cache.key, *cache.value)],
        'shapes': {path[-1].key: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]},
        'training_shards': {
            'init': shard_shapes(params),
            'loaded': shard_shapes(loaded),
            'placed': shard_shapes(sharding.shard(expected, training)),
            'gradient': shard_shapes(sharded_gradient),
            'moments': shard_shapes(state[0].mu),
        },
        'sampling_shards': shard_shapes(for_sampling),
        'apart_shards': shard_shapes(apart),
        'batch_shard': list(batch['tokens'].addressable_shards[0].data.shape),
        'sent_in_decode': sent,
        'gathered_in_decode': largest_gather(sent),
        'gathered_in_decode_by_training_rules': largest_gather(sent_in_decode(params, batch)),
    }


if __name__ == '__main__':
    assert jax.device_count() == 8
    main(Path(sys.argv[1]))
