"""Limits of the machine: the least bytes and floating-point operations of each case, and the memory that it takes.

A case is a list of phases, one after the other. A phase cannot be faster than its operations at the measured rate of
matrix products, nor than its bytes at the measured bandwidth; its limit is the larger of the two, and that of a case
the sum over its phases. What is counted is what the task needs, and not what some implementation does:

- a pass over tokens: 2 operations for each token and weight that is multiplied (2NT), and each weight read once;
- gradients: twice a pass more (6NT in all). What is recomputed to save memory is not counted;
- the optimizer: parameters and both moments read and written, the gradient written and read, in float32;
- attention while decoding: the keys and values of all cached tokens read once for every new token. Its operations,
  4 for each query head, head dimension and cached token, are counted in decoding and in prefilling, and not in
  gradients, as usual for 6NT;
- logits only where something is predicted, or learned from.

The embedding is looked up, so that only the output matrix counts as multiplied.
"""

import dataclasses
from collections.abc import Sequence

from simrl.models.abstract import activation_bytes
from simrl.models.attention import LONG_ROW
from simrl.models.transformer import TransformerConfig
from tools.benchmark.job import Remat

STATE_BYTES = 16  # of a parameter in training: itself, its gradient and two moments, float32
OPTIMIZER_BYTES = 32  # moved by a parameter's update: three numbers read and written, and the gradient both
PROCESS_BYTES = 600 * 2**20  # of a Python process with its libraries
HEADROOM = 0.9  # of the memory there is, that a run may take


class TooLarge(SystemExit):
    """The sizes need more memory than there is."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates measured on this machine, in this run."""

    flops: float  # per second, of matrix products in the dtype of the run
    bandwidth: float  # bytes per second


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a case that must end before the next begins."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)


@dataclasses.dataclass(frozen=True)
class Limit:
    """The least time that a case can take, and how much of it the memory is what limits."""

    seconds: float
    memory_share: float

    @property
    def by(self) -> str:
        return 'bandwidth' if self.memory_share > 0.5 else 'matrix products'


def limit_of(phases: Sequence[Phase], rates: Rates) -> Limit:
    """The least time of phases that follow each other."""
    seconds = [phase.seconds(rates) for phase in phases]
    bound = [s for phase, s in zip(phases, seconds, strict=True) if phase.bytes / rates.bandwidth >= s]
    return Limit(seconds=sum(seconds), memory_share=sum(bound) / sum(seconds))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Numbers of a model that are multiplied, or stored.

    Attributes:
        layers: of the matrices of all layers.
        head: of the output matrix.
        stored: all parameters, norms aside.
        cache: numbers that a cached token takes, keys and values of all layers.
        attention: operations of one query on one cached token, all layers: 2 for the score and 2 for the mixing.
    """

    layers: int
    head: int
    stored: int
    cache: int
    attention: int


def weights_of(config: TransformerConfig) -> Weights:
    """Counts a decoder's weights, without the padding of the vocabulary."""
    c = config
    attention = c.model_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layers = c.num_layers * (attention + 3 * c.model_dim * c.mlp_dim)
    head = c.vocab_size * c.model_dim
    return Weights(
        layers=layers,
        head=head,
        stored=layers + head * (1 if c.tied_embedding else 2),
        cache=2 * c.num_layers * c.num_kv_heads * c.head_dim,
        attention=4 * c.num_layers * c.num_heads * c.head_dim,
    )


def decoding(weights: Weights, *, rows: int, cached: int, steps: int, item: int) -> list[Phase]:
    """Sampling `steps` tokens one by one, where `cached` tokens precede the first of them; `item` bytes a number."""
    read = (weights.layers + weights.head) * item
    return [
        Phase(
            flops=rows * (2 * (weights.layers + weights.head) + weights.attention * length),
            bytes=read + rows * length * weights.cache * item,
        )
        for length in range(cached, cached + steps)
    ]


def prefilling(weights: Weights, *, rows: int, cached: int, tokens: int, item: int) -> Phase:
    """Feeding `tokens` given tokens a row after `cached` ones, without logits."""
    seen = tokens * cached + tokens * (tokens + 1) // 2
    return Phase(
        flops=rows * (2 * weights.layers * tokens + weights.attention * seen),
        bytes=weights.layers * item + rows * (cached + tokens) * weights.cache * item,
    )


def gradient_step(weights: Weights, *, tokens: int, trained: int, item: int) -> list[Phase]:
    """Forward, backward and AdamW.

    Args:
        tokens: real ones, that is, without padding.
        trained: those whose prediction is in the loss.
    """
    return [
        Phase(
            flops=6 * (weights.layers * tokens + weights.head * trained),
            bytes=2 * (weights.layers + weights.head) * item,
        ),
        Phase(flops=0, bytes=OPTIMIZER_BYTES * weights.stored),
    ]


def memory_of_decoding(
    weights: Weights, config: TransformerConfig, *, rows: int, context: int, item: int, views: int = 1, devices: int = 1
) -> int:
    """About the bytes of one side: weights on each device, caches, and logits in float32.

    Args:
        views: how many caches there are of a row, each twice (it is copied where it grows).
    """
    return (
        PROCESS_BYTES
        + devices * weights.stored * item
        + 2 * views * rows * context * weights.cache * item
        + 3 * rows * config.vocab_size * 4
    )


def memory_of_gradients(
    weights: Weights, config: TransformerConfig, *, rows: int, context: int, item: int, remat: Remat, logits: int
) -> int:
    """About the bytes of one side, within a factor of two: the state of training, and `activation_bytes`.

    No side has the scores of long rows.

    Args:
        logits: positions whose logits exist at once.
    """
    activations = activation_bytes(
        config, rows=rows, tokens=context, item=item, remat=remat, scores=context < LONG_ROW['cpu'], logits=logits
    )
    return PROCESS_BYTES + STATE_BYTES * weights.stored + activations


def check_memory(what: str, needed: int, available: int | None, sides: int, advice: str) -> None:
    """Refuses sizes before anything of them is allocated.

    Args:
        what: the case and its sizes, for the message.
        needed: the estimate for all sides together, bytes; they are loaded at the same time.
        available: bytes; None: unknown, which is printed and refuses nothing.
        advice: what would help, for the message.

    Raises:
        TooLarge: they need more than `HEADROOM` of it.
    """
    if available is None:
        print(f'{what}: an estimated {needed / 2**30:.1f} GiB; the memory there is: unknown', flush=True)
        return
    limit = int(HEADROOM * available)
    if needed > limit:
        processes = 'one process' if sides == 1 else f'{sides} processes at once'
        raise TooLarge(
            f'{what}: an estimated {needed / 2**30:.1f} GiB for {processes}, expected at most '
            f'{limit / 2**30:.1f} GiB ({HEADROOM:.0%} of the {available / 2**30:.1f} GiB there are); {advice}'
        )
