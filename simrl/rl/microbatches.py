"""Schedules the rows of a batch for gradient steps, on the host, by their lengths.

1. Each epoch shuffles the rows and splits them into minibatches. One minibatch is one optimizer step.
2. The rows of a minibatch are sorted by length and split into microbatches of equal size (`rows.split_by_length`).
   A microbatch is padded to the shortest bucket that fits its longest row, so at most one program per bucket compiles.

Step 2 changes no result beyond rounding.
"""

from collections.abc import Sequence

import numpy as np

from simrl.models.rows import Microbatch, split_by_length
from simrl.rl.algorithm import AlgorithmSettings


def schedule_microbatches(
    length: np.ndarray, widths: Sequence[int], settings: AlgorithmSettings, random: np.random.Generator
) -> list[list[Microbatch]]:
    """Lists the microbatches of each of `epochs` x `minibatches` optimizer steps.

    Args:
        length: int `[B]`, number of tokens of each row.
        widths: ascending bucket widths; the last is the width of the batch.
        random: shuffles rows over minibatches; unused with one minibatch.

    Raises:
        ValueError: the rows cannot be split evenly, or one is longer than the last width.
    """
    settings.rows_per_microbatch(len(length))
    steps = []
    for _ in range(settings.epochs):
        order = np.arange(len(length)) if settings.minibatches == 1 else random.permutation(len(length))
        for rows in np.split(order, settings.minibatches):
            steps.append(split_by_length(rows, length, widths, settings.microbatches))
    return steps
