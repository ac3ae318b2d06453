"""The torch and transformers side of every case but GRPO's step. It runs in the peers' own environment, without simrl.

    python -m tools.benchmark.peers.torch_peer JOB.json

A process of its own, started by the tool: requests come by standard input. See `protocol.py`.
"""

import functools
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import transformers

from tools.benchmark.job import CLIP_NORM, CPU_BYTES, CPU_SIDE, GPU_BYTES, GPU_SIDE, LEARNING_RATE, Job
from tools.benchmark.protocol import Bench, Message, best_seconds, main

ASSISTANT = 3  # the role of tokens in `Job.arrays`
IGNORED = -100  # the label of tokens without a loss
EPSILON = 1e-6  # added to the standard deviation of a group's rewards


def load(job: Job, bench: Bench, dtype: str) -> Any:
    """The model, and the answer to `score`: log-probabilities of given rows, a row at a time."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, dtype), attn_implementation='sdpa'
    )
    model.to(device_of(job))

    def answer(request: Message) -> Message:
        with np.load(request['rows']) as file:
            tokens = torch.from_numpy(file['tokens'].astype(np.int64)).to(model.device)
            token_mask = torch.from_numpy(file['token_mask']) if 'token_mask' in file else None
        with torch.no_grad(), autocast(job):
            scores = [log_probs(model, row[None], token_mask) for row in tokens]
        np.save(request['output'], torch.cat(scores).float().cpu().numpy())
        return {}

    bench.handlers['score'] = answer
    bench.device_peak = functools.partial(device_peak, job)
    return model


def device_of(job: Job) -> str:
    return 'cuda' if job.gpu else 'cpu'


def device_peak(job: Job) -> int | None:
    if not job.gpu:
        return None
    return torch.cuda.max_memory_allocated()


def wait_for_device(job: Job) -> None:
    if job.gpu:
        torch.cuda.synchronize()


def autocast(job: Job) -> Any:
    """Products in bfloat16 with float32 parameters, where the run is in bfloat16."""
    return torch.autocast(device_of(job), torch.bfloat16, enabled=job.dtype == 'bfloat16')


def log_probs(model: Any, tokens: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Of each token given those before it, float32 `[B, T]`; 0 for the first, which nothing predicts."""
    logits = model(input_ids=tokens).logits[:, :-1].float()
    if token_mask is not None:
        logits[..., : len(token_mask)].masked_fill_(~token_mask.to(logits.device), -torch.inf)
        logits[..., len(token_mask) :] = -torch.inf
    chosen = torch.gather(torch.log_softmax(logits, dim=-1), 2, tokens[:, 1:, None])[..., 0]
    return F.pad(chosen, (1, 0))


def generation(new_tokens: int) -> transformers.GenerationConfig:
    """Plain sampling of exactly so many tokens: no token ends a row."""
    return transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )


def generate(model: Any, tokens: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """`[B, N]` rows of equal length -> `[B, N + new_tokens]`."""
    with torch.no_grad():
        rows: torch.Tensor = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=generation(new_tokens)
        )
    return rows


def runs(columns: list[int], like: torch.Tensor) -> torch.Tensor:
    """The same ids in every row."""
    return torch.tensor(columns, dtype=like.dtype, device=like.device).expand(len(like), -1)


def sampling(job: Job, bench: Bench) -> None:
    model = load(job, bench, job.dtype).eval()
    model.generation_config = generation(job.new_tokens)
    with np.load(job.arrays) as file:
        prompts = torch.from_numpy(file['prompts'].astype(np.int64)).to(model.device)
    prompts = torch.cat(
        [prompts, runs(json.loads(job.texts.read_text(encoding='utf-8'))['own_header'], prompts)], dim=1
    )
    bench.ready()
    while True:
        request = bench.wait()
        rows = generate(model, prompts, request['new_tokens'])
        wait_for_device(job)
        bench.done(sampled=rows[:, prompts.shape[1] :].numel())


def conversations(job: Job, bench: Bench) -> None:
    """Two models of the same weights that take turns; each message prefills all that was said before it anew."""
    model = load(job, bench, job.dtype).eval()
    model.generation_config = generation(job.new_tokens)
    with np.load(job.arrays) as file:
        prompts = torch.from_numpy(file['prompts'].astype(np.int64)).to(model.device)
    texts = json.loads(job.texts.read_text(encoding='utf-8'))
    assistant = runs(texts['own_header'], prompts), runs([texts['end_of_turn']], prompts)
    user = runs(texts['partner_header'], prompts), runs([texts['partner_end_of_turn']], prompts)
    bench.ready()
    while True:
        bench.wait()
        said, sampled = prompts, 0
        for message in range(1, 2 * job.turns):
            header, end = assistant if message % 2 else user
            asked = torch.cat([said, header], dim=1)
            rows = generate(model, asked, job.new_tokens)
            sampled += rows[:, asked.shape[1] :].numel()
            said = torch.cat([rows, end], dim=1)
        wait_for_device(job)
        bench.done(sampled=sampled)


def trainable(job: Job, bench: Bench) -> tuple[Any, Any]:
    """The model and AdamW, with the moments allocated, as simrl's are when it has loaded."""
    model = load(job, bench, 'float32').train()
    if job.remat == 'full':
        model.gradient_checkpointing_enable({'use_reentrant': False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # of zero gradients at a rate of zero: it only makes the moments
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        state['step'].zero_()
    for group in optimizer.param_groups:
        group['lr'] = LEARNING_RATE
    return model, optimizer


def step(model: Any, optimizer: Any, loss: torch.Tensor) -> dict[str, float]:
    """Backward, clipping and AdamW."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {'loss': float(loss.detach()), 'grad_norm': float(norm)}


def rows_of(job: Job, device: Any) -> dict[str, torch.Tensor]:
    """The arrays of the job, and `attention`, the mask of real tokens."""
    with np.load(job.arrays) as file:
        rows = {name: torch.from_numpy(file[name]).to(device) for name in file.files}
    rows['tokens'] = rows['tokens'].long()
    index = torch.arange(job.context, device=device)
    rows['attention'] = (index < rows['length'][:, None]).long()
    return rows


def inputs_of(rows: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of the model's forward pass in training: no cache, which it would make by default."""
    return {'input_ids': rows['tokens'], 'attention_mask': rows['attention'], 'use_cache': False}


def supervised(job: Job, bench: Bench) -> None:
    """Mean cross-entropy of the trained tokens, by the model's own loss."""
    model, optimizer = trainable(job, bench)
    rows = rows_of(job, model.device)
    inputs = inputs_of(rows)
    labels = torch.where(rows['trained'], rows['tokens'], IGNORED)
    bench.ready()
    while True:
        bench.wait()
        with autocast(job):
            loss = model(**inputs, labels=labels).loss
        facts = step(model, optimizer, loss)
        wait_for_device(job)
        bench.done(**facts)


def update_ragged(job: Job, bench: Bench) -> None:
    """GRPO's clipped surrogate with one update a batch, as a mean over the trained tokens of one group.

    With `Job.logits` 'all' the model makes logits of every position, as it does by default; with 'trained' the hidden
    states are gathered first, so that only what the loss reads is made.
    """
    model, optimizer = trainable(job, bench)
    rows = rows_of(job, model.device)
    inputs, reward = inputs_of(rows), rows['reward']
    advantage = ((reward - reward.mean()) / (reward.std() + EPSILON))[:, None].expand(rows['tokens'].shape)
    predicted = rows['trained'][:, 1:]
    targets, advantage = rows['tokens'][:, 1:][predicted], advantage[:, 1:][predicted]
    bench.ready()
    while True:
        bench.wait()
        with autocast(job):
            if job.logits == 'trained':
                hidden = model.model(**inputs).last_hidden_state
                logits = model.lm_head(hidden[:, :-1][predicted])
            else:
                logits = model(**inputs).logits[:, :-1][predicted]
        log_prob = -F.cross_entropy(logits.float(), targets, reduction='none')
        ratio = torch.exp(log_prob - log_prob.detach())
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        facts = step(model, optimizer, loss)
        wait_for_device(job)
        bench.done(**facts)


def rates(job: Job, bench: Bench) -> None:
    """Not a case: the machine as torch finds it, with the sizes that JAX is given."""
    torch.set_num_threads(job.threads)
    device = device_of(job)

    def best(run: Callable[[], object]) -> float:
        def finished() -> None:
            run()
            wait_for_device(job)

        return best_seconds(finished)

    side = GPU_SIDE if job.gpu else CPU_SIDE
    x = torch.ones((side, side), dtype=getattr(torch, job.dtype), device=device)
    flops = 2 * side**3 / best(lambda: x @ x)
    array = torch.ones((GPU_BYTES if job.gpu else CPU_BYTES) // 4, device=device)
    size = array.numel() * 4
    bandwidth = max(size / best(array.sum), 2 * size / best(lambda: array + 1))
    versions = [f'{name} {importlib.metadata.version(name)}' for name in ('torch', 'transformers', 'trl')]
    bench.ready(flops=flops, bandwidth=bandwidth, version=', '.join(versions))
    bench.wait()


CASES: dict[str, Callable[[Job, Bench], None]] = {
    'sampling': sampling,
    'update_full': supervised,
    'update_ragged': update_ragged,
    'conversations': conversations,
    'sft': supervised,
    'rates': rates,
}


if __name__ == '__main__':
    main(CASES)
