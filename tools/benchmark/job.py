"""Measurements of one side, as a file that both sides read. Nothing here needs simrl or torch."""

import dataclasses
import json
import pathlib
from typing import Literal

Dtype = Literal['float32', 'bfloat16']
Remat = Literal['none', 'dots', 'full']
Attention = Literal['auto', 'xla', 'chunked', 'splash', 'cudnn']  # of simrl's `Execution`

CASES = ('sampling', 'update_full', 'update_ragged', 'grpo_step', 'conversations', 'sft')
LEARNING_RATE = 1e-5  # of AdamW, with its usual constants, no weight decay, and gradients clipped to norm 1
CLIP_NORM = 1.0
# Of what every side measures the machine with.
CPU_SIDE, GPU_SIDE = 2048, 8192  # of the square matrices
CPU_BYTES, GPU_BYTES = 512 * 2**20, 4 * 2**30  # of the array that is read


@dataclasses.dataclass(frozen=True)
class Job:
    """One case at one size, the same for every side.

    Attributes:
        case: of `CASES`.
        model: a Hugging Face folder, in the dtype of the run.
        dtype: of matrix products. Training keeps parameters and moments in float32.
        batch: rows.
        context: tokens of the longest row, everything included.
        turns: user messages with a reply; 1 in all cases but `conversations`.
        new_tokens: sampled for each message.
        samples: rows of each prompt, the groups of `grpo_step`.
        remat: what the backward pass recomputes; a peer's is of `peers_remat`.
        attention: simrl's implementation.
        logits: of which positions a torch peer makes logits: 'all', as a transformers model does, or 'trained'.
        gpu: False keeps every side on the CPU.
        threads: of each side, on that many cores; the sides take turns.
        devices: of XLA that simrl splits its rows over, on a CPU: they share the threads. Batched products of small
            matrices, as in attention to a cache, run on one thread of each device.
        inputs: a file of arrays and one of texts, from `inputs.write`, without their suffixes.
        scratch: a folder for what sides write.
    """

    case: str
    model: pathlib.Path
    dtype: Dtype
    batch: int
    context: int
    turns: int
    new_tokens: int
    samples: int
    remat: Remat
    attention: Attention
    logits: Literal['all', 'trained']
    gpu: bool
    threads: int
    devices: int
    inputs: pathlib.Path
    scratch: pathlib.Path

    @property
    def arrays(self) -> pathlib.Path:
        return self.inputs.with_suffix('.npz')

    @property
    def texts(self) -> pathlib.Path:
        return self.inputs.with_suffix('.json')


def peers_remat(remat: Remat) -> Remat:
    """Recomputation of peers where simrl has `remat`: all of a layer or nothing, as they have no more ways."""
    return 'full' if remat == 'full' else 'none'


def pieces_of(rows: int) -> int:
    """The microbatches that simrl sorts ragged rows into by their lengths: at most four, of equal numbers of rows."""
    return next(pieces for pieces in (4, 2, 1) if rows % pieces == 0)


def write(job: Job, path: pathlib.Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(job), default=str, indent=1) + '\n', encoding='utf-8')


def read(path: pathlib.Path) -> Job:
    fields = json.loads(path.read_text(encoding='utf-8'))
    return Job(**fields | {name: pathlib.Path(fields[name]) for name in ('model', 'inputs', 'scratch')})
