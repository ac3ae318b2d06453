"""simrl's own sampler, in a process of its own: replies to prompts in batches, without a server.

Started by `tools.serving_load`; requests and replies are those of `tools.benchmark.protocol`.
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.records import Example
from simrl.experiments.settings import MeshSettings
from simrl.rollouts.agents import Limits, ModelAgent, opening_only
from simrl.rollouts.collect import collect
from simrl.rollouts.token_sampling import Sampling
from simrl.rollouts.trajectories import transcripts
from simrl.run.runtime import enable_compilation_cache, numeric_defaults, start_backend
from simrl.serving.load import load_assistant, resampled
from tools.benchmark.measure import ROOT
from tools.benchmark.protocol import Bench, Side, serve


def start(model: str, folder: pathlib.Path, *, max_tokens: int, sampling: Sampling, seed: int) -> Side:
    """Starts the process.

    Args:
        folder: for its log.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    job = {'model': model, 'max_tokens': max_tokens, 'temperature': sampling.temperature, 'top_p': sampling.top_p}
    command = [sys.executable, '-m', 'tools.serving_load.offline', json.dumps(job | {'seed': seed})]
    return Side('offline', command, environment=os.environ | {'PYTHONPATH': path}, log=folder / 'offline.log')


def work(bench: Bench) -> None:
    """Loads the model, then samples replies to the prompts of each request: once unmeasured, which compiles."""
    job = json.loads(sys.argv[1])
    start_backend()
    enable_compilation_cache()
    with numeric_defaults():
        loaded = load_assistant(job['model'])
        sampling = {name: job[name] for name in ('temperature', 'top_p')}
        agent, chat = resampled(loaded.agent, max_new_tokens=job['max_tokens'], **sampling), loaded.chat
        if not isinstance(agent, ModelAgent):
            raise ValueError(f'{job["model"]}: expected a model, found a program')
        mesh = MeshSettings(data=1).make()

        def sample(examples: Sequence[Example], size: int, limits: Limits) -> int:
            """The number of tokens that were sampled, ends of messages included, as servers count them."""
            tokens = 0
            for start in range(0, len(examples), size):
                chosen = examples[start : start + size]
                batch, _ = collect(
                    opening_only(),
                    agent,
                    chosen,
                    chat=chat,
                    limits=limits,
                    seed=job['seed'],
                    step=0,
                    view=ASSISTANT,
                    mesh=mesh,
                    padding=size - len(chosen),
                )
                replies = [row['messages'][-1] for row in transcripts(batch, chat.decode)[: len(chosen)]]
                tokens += sum(reply['tokens'] + (not reply['truncated']) for reply in replies)
            return tokens

        bench.ready()
        while True:
            request = bench.wait()
            examples = [Example(str(i), text, None, 0, 'prompt', 'test') for i, text in enumerate(request['texts'])]
            limits = Limits(
                turns=1,
                prompt_tokens=max(len(agent.prompt(example)) for example in examples),
                assistant_tokens=agent.max_new_tokens,
                user_tokens=1,
            )
            sample(examples, request['streams'], limits)  # what follows compiles nothing: it is the same
            began = time.perf_counter()
            tokens = sample(examples, request['streams'], limits)
            bench.done(sampling_seconds=time.perf_counter() - began, tokens=tokens)


if __name__ == '__main__':
    serve(work)
