"""The machine as JAX finds it: the rate of matrix products, the bandwidth of memory, and how much of it there is."""

import jax
import jax.numpy as jnp

from tools.benchmark.job import CPU_BYTES, CPU_SIDE, GPU_BYTES, GPU_SIDE, Job
from tools.benchmark.protocol import Bench, best_seconds


def matrix_rate(dtype: str, side: int) -> float:
    """Operations per second of a product of two square matrices."""
    x = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * side**3 / best_seconds(lambda: product(x, x).block_until_ready())


def bandwidth(num_bytes: int) -> float:
    """Bytes per second, the best of reading an array into one sum and of adding to it (read and written)."""
    x = jnp.ones((num_bytes // 4,), jnp.float32)
    total, shifted = jax.jit(jnp.sum), jax.jit(lambda a: a + 1)
    return max(
        x.nbytes / best_seconds(lambda: total(x).block_until_ready()),
        2 * x.nbytes / best_seconds(lambda: shifted(x).block_until_ready()),
    )


def device_bytes() -> int | None:
    """The memory of the accelerator that JAX may use; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get('bytes_limit')


def device_peak() -> int | None:
    """The most memory of the accelerator that this process had in use, of all time; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get('peak_bytes_in_use')


def measure(job: Job, bench: Bench) -> None:
    """Not a case: what the machine can do, as one reply."""
    on_gpu = jax.default_backend() != 'cpu'
    bench.ready(
        flops=matrix_rate(job.dtype, GPU_SIDE if on_gpu else CPU_SIDE),
        bandwidth=bandwidth(GPU_BYTES if on_gpu else CPU_BYTES),
        device=jax.devices()[0].device_kind,
        device_bytes=device_bytes(),
        devices=jax.device_count(),
        version=f'jax {jax.__version__}',
    )
    bench.wait()
