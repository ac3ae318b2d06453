"""A small training job over the real loop, run as a process by the kill tests: `tiny_job.py FOLDER [--fault=NAME]`."""

import argparse
import functools
import os
import pathlib
import resource
import signal
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.struct
import jax
import jax.numpy as jnp
import optax

from simrl.run.metrics import Metrics
from simrl.run.runtime import enable_compilation_cache
from simrl.training import loop

VOCAB, DIM, BATCH, TIME = 32, 16, 4, 12
OPTIMIZER = optax.adam(3e-3)


@flax.struct.dataclass
class TrainState:
    params: dict[str, jax.Array]
    opt_state: optax.OptState
    nonfinite: jax.Array


def init_state() -> TrainState:
    keys = jax.random.split(jax.random.key(0))
    shapes = {'embedding': (VOCAB, DIM), 'head': (DIM, VOCAB)}
    params = {name: 0.1 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return TrainState(params, OPTIMIZER.init(params), jnp.zeros((), jnp.int32))


@jax.jit
def batch(step: int) -> tuple[jax.Array, jax.Array]:
    """Counting upwards from a random start; which tokens are trained is random too."""
    start, mask = jax.random.split(jax.random.fold_in(jax.random.key(7), step))
    tokens = (jax.random.randint(start, (BATCH, 1), 0, VOCAB) + jnp.arange(TIME)) % VOCAB
    return tokens, jax.random.bernoulli(mask, 0.7, (BATCH, TIME - 1))


def losses(params: dict[str, jax.Array], tokens: jax.Array, trained: jax.Array) -> Metrics:
    logits = jnp.tanh(params['embedding'][tokens[:, :-1]]) @ params['head']
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return {'loss': (jnp.sum(loss, where=trained), jnp.sum(trained).astype(jnp.float32))}


@functools.partial(jax.jit, donate_argnums=0)
def update(state: TrainState, tokens: jax.Array, trained: jax.Array, broken: bool) -> tuple[TrainState, Metrics]:
    """One step of Adam; `broken` makes its loss NaN, and an update that is not finite is skipped and counted."""

    def loss_fn(params: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        metrics = losses(params, tokens, trained)
        total, weight = metrics['loss']
        total = jnp.where(broken, jnp.nan, total)
        return total / weight, {'loss': (total, weight)}

    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    new = TrainState(optax.apply_updates(state.params, updates), opt_state, jnp.zeros_like(state.nonfinite))
    skipped = state.replace(nonfinite=state.nonfinite + 1)
    return jax.tree.map(lambda x, y: jnp.where(jnp.isfinite(loss), x, y), new, skipped), metrics


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--step-seconds', type=float, default=0.02)
    parser.add_argument('--fault', choices=('none', 'nan', 'disk', 'raise'), default='none')
    parser.add_argument('--limit', type=int, default=4096, help='bytes a file may have after --fault=disk')
    parser.add_argument('--profile-step', type=int, default=0)
    parser.add_argument('--cache', type=pathlib.Path)
    args = parser.parse_args()
    enable_compilation_cache(args.cache)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, loop.StepResult]:
        time.sleep(args.step_seconds)
        if args.fault == 'raise' and step == 12:
            raise ArithmeticError('the step failed')
        if args.fault == 'disk' and step == 12:
            signal.signal(
                signal.SIGXFSZ, signal.SIG_IGN
            )  # writing beyond the limit is then an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (args.limit, resource.RLIM_INFINITY))
        tokens, trained = batch(step)
        state, metrics = update(state, tokens, trained, args.fault == 'nan' and step >= 12)
        rows = []
        if step % 7 == 0:
            content = ' '.join(map(str, tokens[0].tolist()))
            rows = [{'messages': [{'role': 'user', 'content': content}], 'seed': step}]
        return state, loop.StepResult(metrics, rows, trained.sum())

    def evaluate_fn(state: TrainState, step: int) -> Metrics:
        return {f'evaluation/{name}': value for name, value in losses(state.params, *batch(1_000_000)).items()}

    # Logging every 3 and saving every 5 steps: the sums of a line straddle most saves.
    settings = loop.LoopSettings(
        log_every=3,
        checkpoint_every=5,
        evaluate_every=20,
        keep_checkpoints=2,
        max_nonfinite=3,
        shown_conversations=1,
        profile_step=args.profile_step,
    )
    loop.run(
        args.folder,
        init_state(),
        step_fn,
        settings,
        num_steps=args.steps,
        name='sft',
        evaluate_fn=evaluate_fn,
        hyperparameters={'optimizer': {'learning_rate': 3e-3}},
    )


if __name__ == '__main__':
    main()
