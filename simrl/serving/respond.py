"""An assistant's conversations with simulated users, as rows for comparisons."""

import collections
import hashlib
from typing import Any

import jax

from simrl.conversations.chat import ASSISTANT
from simrl.experiments.work import MATRIX_STEP, fitting_simulator
from simrl.models import placement
from simrl.remote.cache import Cache
from simrl.rewards.judging import heard
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.trajectories import transcripts
from simrl.run.config import local_path
from simrl.run.progress import Progress
from simrl.serving.identity import identity_of, identity_of_simulator
from simrl.serving.load import find_run, load_assistant, simulators

Row = dict[str, Any]


def with_user(assistant: str, user: str, cache: Cache, *, people: int) -> tuple[list[Row], collections.Counter[str]]:
    """An assistant's conversations with the first held-out people of its run, and the number of failed ones by cause.

    A simulator of the run plays them, with the seed and the draws of the run's matrix: every assistant meets the same,
    and conversations are those that the matrix has the scores of. A message that ended one is left out: the assistant
    never read it.

    Args:
        assistant: RUN/initial or RUN/ARM/seed-K.
        user: a name of `load.simulators`.
        cache: keeps conversations as they come. Weights are loaded if one is missing.

    Returns:
        Rows `{id, person, intent, end, messages}`. The person is known where the user writes the opening.

    Raises:
        FileNotFoundError, ValueError, WorkdirError: there is none of that name, or it cannot be read.
    """
    if (run := find_run(local_path(assistant))) is None:
        raise ValueError(f'{assistant}: expected an assistant of a run, such as RUN/initial, found no run')
    scene, _ = run
    known = simulators(scene)
    if user not in known:
        raise ValueError(f'{user}: expected a simulator of the run ({", ".join(known)})')
    if people < 1:
        raise ValueError(f'people: expected at least 1, found {people}')
    examples = scene.held_out_examples(range(people))
    identity = f'{identity_of(assistant)} {identity_of_simulator(scene, *known[user])} {jax.default_backend()}'
    keys = {of.id: hashlib.sha256(f'{identity} {of}'.encode()).hexdigest() for of in examples}
    rows = {name: row for name, key in keys.items() if (row := cache.get(key)) is not None}
    waiting = [example for example in examples if example.id not in rows]
    failed = collections.Counter[str]()
    if waiting:
        mesh, size = scene.compute.mesh.make(), scene.settings.evaluation.batch_size
        with jax.set_mesh(mesh):
            simulator = for_sampling(fitting_simulator(scene, *known[user], examples), mesh)
            agent = load_assistant(assistant).agent
        check_agents(simulator, agent, scene.chat, scene.limits)
        with Progress('conversations', len(examples), done=len(rows)) as progress:
            for start in range(0, len(waiting), size):
                chosen = waiting[start : start + size]
                batch, reasons = collect(
                    simulator,
                    agent,
                    chosen,
                    chat=scene.chat,
                    limits=scene.limits,
                    seed=scene.settings.evaluation.seed,
                    step=MATRIX_STEP,
                    view=ASSISTANT,
                    mesh=mesh,
                    padding=size - len(chosen),
                )
                found = transcripts(placement.to_host(batch), scene.chat.decode)[: len(chosen)]
                for number, (example, row) in enumerate(zip(chosen, found, strict=True)):
                    if row['end_reason'] == 'failure':
                        failed[reasons.get(number, 'failure')] += 1
                        continue
                    rows[example.id] = cache.put(
                        keys[example.id],
                        {
                            'id': example.id,
                            # Without an opening the example is a person, and not a text that several may have written.
                            'person': example.id if example.opening is None else None,
                            'intent': example.intent,
                            'end': row['end_reason'],
                            'messages': [{'role': role, 'content': text} for role, text in heard(row)],
                        },
                        model=assistant,
                    )
                progress.update(len(chosen))
    return [rows[example.id] for example in examples if example.id in rows], failed
