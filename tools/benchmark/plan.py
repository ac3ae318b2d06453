"""Plan of the cases: sizes, peers, and the least that each of them needs."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from simrl.models.abstract import ITEM_BYTES
from simrl.models.transformer import Execution, TransformerConfig
from tools.benchmark import limits
from tools.benchmark.inputs import Counts
from tools.benchmark.job import CASES, Job, Remat, peers_remat, pieces_of
from tools.benchmark.limits import Phase, Weights

TORCH, TRL = 'torch_peer', 'trl_peer'
SWEPT = ('batch', 'context', 'turns')
FACTORS = (0.25, 0.5, 1, 2)  # of a swept size
TURNS = (1, 2, 5, 10)  # of a sweep; the context grows with them, so that messages keep their length


@dataclasses.dataclass(frozen=True)
class Peer:
    """Whom a case is compared with.

    Attributes:
        name: for the table.
        script: the module of `tools.benchmark.peers`.
        logits: see `Job`.
    """

    name: str
    script: str
    logits: Literal['all', 'trained'] = 'all'


GENERATE = Peer('transformers generate', TORCH)
PEERS: Mapping[str, Sequence[Peer]] = {
    'sampling': (GENERATE,),
    'update_full': (Peer('torch', TORCH),),
    'update_ragged': (Peer('torch', TORCH), Peer('torch, logits of trained tokens only', TORCH, 'trained')),
    'grpo_step': (Peer('TRL', TRL),),
    'conversations': (Peer('transformers generate, each turn prefilled anew', TORCH),),
    'sft': (Peer('torch', TORCH),),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows, tokens of the longest of them, and turns of a conversation."""

    batch: int
    context: int
    turns: int = 1


CPU_SIZES: Mapping[str, Sequence[Size]] = {
    'sampling': (Size(16, 256), Size(64, 256)),
    'update_full': (Size(4, 256),),
    'update_ragged': (Size(8, 256),),
    'grpo_step': (Size(16, 128),),
    'conversations': (Size(8, 512, 5),),
    'sft': (Size(4, 256),),
}
# Those of training are small because both sides hold the state of training at once: alone they may be larger.
GPU_SIZES: Mapping[str, Sequence[Size]] = {
    'sampling': (Size(64, 4096), Size(256, 2048), Size(512, 512)),
    'update_full': (Size(4, 2048),),
    'update_ragged': (Size(4, 2048),),
    'grpo_step': (Size(16, 512),),
    'conversations': (Size(64, 2048, 5),),
    'sft': (Size(4, 2048),),
}


def sizes_of(
    case: str,
    defaults: Sequence[Size],
    batch: Sequence[int] | None,
    context: Sequence[int] | None,
    turns: Sequence[int] | None,
    sweep: Sequence[str],
) -> list[Size]:
    """The sizes that a case runs at, each once.

    Args:
        batch, context, turns: what was asked for, in every combination; None: as in `defaults`. Only conversations
            have turns.
        sweep: of `SWEPT`, the sizes that are varied around the first of the others.
    """
    if case != 'conversations':
        turns = None
    chosen = [
        Size(*values)
        for default in defaults
        for values in itertools.product(
            batch or [default.batch], context or [default.context], turns or [default.turns]
        )
    ]
    for name in sweep:
        if name == 'turns':
            swept = [dataclasses.replace(chosen[0], turns=n) for n in TURNS] if case == 'conversations' else []
            chosen += [dataclasses.replace(s, context=s.context * s.turns // chosen[0].turns) for s in swept]
        else:
            value = getattr(chosen[0], name)
            chosen += [dataclasses.replace(chosen[0], **{name: max(int(value * factor), 1)}) for factor in FACTORS]
    return list(dict.fromkeys(chosen))


def samples_of(case: str, batch: int, samples: int) -> int:
    """Rows of each prompt.

    Raises:
        ValueError: the groups of a GRPO step do not fill its rows.
    """
    if case != 'grpo_step':
        return 1
    if samples < 2 or batch % samples:
        raise ValueError(f'--samples: expected at least 2 that divide the {batch} rows of a step, found {samples}')
    return samples


def check_devices(devices: int, case: str, chosen: Sequence[Size]) -> None:
    """Refuses devices of which each could not have as many rows as any other.

    Raises:
        ValueError: they do not divide the rows of a batch, or of a microbatch.
    """
    for size in chosen:
        rows = size.batch // (pieces_of(size.batch) if case == 'update_ragged' else 1)
        if rows % devices:
            raise ValueError(f'--devices: expected a number that divides the {rows} rows of {case}, found {devices}')


def memory(
    config: TransformerConfig, case: str, size: Size, dtype: str, *, remat: Remat, ours: bool, devices: int = 1
) -> int:
    """About the bytes of one side; see `limits`.

    Args:
        devices: of simrl. Each has all weights to decode with; of training they divide the state, and gather little.
    """
    weights, item = limits.weights_of(config), ITEM_BYTES[dtype]
    decoding = limits.memory_of_decoding(
        weights,
        config,
        rows=size.batch,
        context=size.context,
        item=item,
        views=2 if ours and case == 'conversations' else 1,
        devices=devices if ours else 1,
    )
    if case in ('sampling', 'conversations'):
        return decoding
    remat = remat if ours else peers_remat(remat)
    logits = Execution().log_prob_chunk if ours else size.batch * size.context
    pieces = pieces_of(size.batch) if ours and case == 'update_ragged' else 1
    training = limits.memory_of_gradients(
        weights, config, rows=size.batch // pieces, context=size.context, item=item, remat=remat, logits=logits
    )
    if pieces > 1:
        training += 4 * weights.stored  # what the gradients add up to
    return training + (decoding - limits.PROCESS_BYTES if case == 'grpo_step' else 0)


def phases(job: Job, counts: Counts, weights: Weights) -> list[Phase]:
    """The least that a run of a case needs; see `limits`."""
    item = ITEM_BYTES[job.dtype]
    if job.case in ('update_full', 'update_ragged', 'sft'):
        return limits.gradient_step(weights, tokens=counts.tokens, trained=counts.trained, item=item)
    if job.case == 'conversations':
        return _conversation(job, counts, weights, item)
    first = _message(weights, rows=job.batch, cached=0, given=counts.prompt + counts.own_header, job=job, item=item)
    if job.case == 'sampling':
        return first
    row = counts.prompt + counts.own_header + job.new_tokens
    update = limits.gradient_step(weights, tokens=job.batch * row, trained=job.batch * job.new_tokens, item=item)
    return first + update


def decoding_phases(job: Job, counts: Counts, weights: Weights) -> list[Phase]:
    """Of `sampling`: what follows the first sampled token."""
    return phases(job, counts, weights)[2:]


def _message(weights: Weights, *, rows: int, cached: int, given: int, job: Job, item: int) -> list[Phase]:
    """Feeding what was given and sampling a message. The last given token makes the first logits."""
    return [
        limits.prefilling(weights, rows=rows, cached=cached, tokens=given - 1, item=item),
        *limits.decoding(weights, rows=rows, cached=cached + given, steps=job.new_tokens, item=item),
    ]


def _conversation(job: Job, counts: Counts, weights: Weights, item: int) -> list[Phase]:
    """Two models that cache what they have read. The opening is given, the assistant has the last word."""
    heard = {'assistant': 0, 'user': 0}  # tokens that each has cached
    said = counts.prompt
    needed: list[Phase] = []
    for message in range(1, 2 * job.turns):
        speaker, header = ('assistant', counts.own_header) if message % 2 else ('user', counts.partner_header)
        said += header
        given = said - heard[speaker]
        needed += _message(weights, rows=job.batch, cached=heard[speaker], given=given, job=job, item=item)
        heard[speaker] = said + job.new_tokens - 1
        said += job.new_tokens + 1
    return needed


def processed_tokens(job: Job, counts: Counts) -> int:
    """Unit of a run's speed: tokens sampled, or in an update real tokens of the rows."""
    if job.case in ('update_full', 'update_ragged', 'sft'):
        return counts.tokens
    return job.batch * job.new_tokens * (2 * job.turns - 1)


def check_cases(names: Sequence[str]) -> list[str]:
    """The cases by name, each once, in their order.

    Raises:
        ValueError: one that there is not.
    """
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f'--cases: expected some of {", ".join(CASES)}, found {unknown[0]!r}')
    return [name for name in CASES if name in names]
