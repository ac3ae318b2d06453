"""TRL's side: whole steps of its GRPO trainer. It runs in the peers' own environment, without simrl.

    python -m tools.benchmark.peers.trl_peer JOB.json

A process of its own, started by the tool: requests come by standard input. See `protocol.py`.
"""

import json
import shutil
from typing import Any

import datasets
import transformers
import trl

from tools.benchmark.job import CLIP_NORM, LEARNING_RATE, Job
from tools.benchmark.peers.torch_peer import load, wait_for_device
from tools.benchmark.protocol import Bench, main

STEPS = 10**6  # more than are ever measured


def grpo_step(job: Job, bench: Bench) -> None:
    """From one call of the reward to the next: an update, then new replies. One update a batch, no reference model."""
    model = load(job, bench, 'float32')
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    openings = json.loads(job.texts.read_text(encoding='utf-8'))['openings']
    prompts = datasets.Dataset.from_list([{'prompt': [{'role': 'user', 'content': text}]} for text in openings])

    def share_of_even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
        wait_for_device(job)
        bench.done(sampled=sum(map(len, completion_ids)))
        bench.wait()
        return rewards

    folder = job.scratch / 'trl'
    settings = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=not job.gpu,
        bf16=job.dtype == 'bfloat16',
        gradient_checkpointing=job.remat == 'full',
        max_steps=STEPS,
        per_device_train_batch_size=job.batch,
        num_generations=job.samples,
        max_completion_length=job.new_tokens,
        generation_kwargs={'min_new_tokens': job.new_tokens},
        temperature=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        loss_type='bnpo',  # a mean over the tokens of the batch
        learning_rate=LEARNING_RATE,
        lr_scheduler_type='constant',
        weight_decay=0.0,
        max_grad_norm=CLIP_NORM,
        optim='adamw_torch_fused',
        logging_strategy='no',
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
        dataloader_pin_memory=job.gpu,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=share_of_even_ids,
        args=settings,
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    bench.ready()
    bench.wait()
    try:
        trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main({'grpo_step': grpo_step})
