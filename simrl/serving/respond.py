"""An assistant's responses, as rows for comparisons: replies to prompts, or conversations with simulated users."""

import collections
import pathlib
from typing import Any

import jax

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.completion import NoText
from simrl.conversations.raw_rows import placed_rows
from simrl.conversations.records import Message
from simrl.evaluation.pairwise.responses import FIELDS, parse_messages
from simrl.experiments.settings import MeshSettings
from simrl.experiments.work import MATRIX_STEP, fitting_simulator
from simrl.models import placement
from simrl.rewards.judging import heard
from simrl.rollouts.agents import ModelAgent
from simrl.rollouts.collect import collect, for_sampling
from simrl.rollouts.completion import replies
from simrl.rollouts.dialogue import check_agents
from simrl.rollouts.trajectories import transcripts
from simrl.run.config import local_path
from simrl.run.progress import Progress
from simrl.serving.load import find_run, load_assistant, resampled, simulators

Rows = list[dict[str, Any]]
Counts = collections.Counter[str]


def read_prompts(path: pathlib.Path) -> Rows:
    """Reads rows `{id, messages, person?, intent?}` whose messages alternate from the user's to the user's.

    Raises:
        ValueError: a row is none, or an id is there twice; it names the row.
    """
    rows: dict[str, dict[str, Any]] = {}
    for place, row in placed_rows(path, FIELDS):
        name = row.get('id')
        if not isinstance(name, str) or not name or name in rows:
            found = f'{name!r} again' if name in rows else repr(name)
            raise ValueError(f'{place}, id: expected a text of its own, found {found}')
        roles = [message.role for message in parse_messages(place, row.get('messages'))]
        if len(roles) % 2 == 0 or roles != [('user', 'assistant')[i % 2] for i in range(len(roles))]:
            raise ValueError(
                f"{place}, messages: expected them to alternate from the user's to the user's, found {', '.join(roles)}"
            )
        rows[name] = {field: row[field] for field in FIELDS if row.get(field) is not None}
    if not rows:
        raise ValueError(f'{path}: expected at least one prompt, found none')
    return list(rows.values())


def to_prompts(
    name: str,
    prompts: Rows,
    *,
    prompt_tokens: int,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> tuple[Rows, Counts]:
    """An assistant's replies to prompts, and the number of prompts without one by cause.

    A reply depends on the assistant, the prompt and the seed alone: the same call gives the same rows.

    Args:
        name: of `load_assistant`.
        prompts: of `read_prompts`.
    """
    loaded = load_assistant(name)
    agent = resampled(loaded.agent, temperature=temperature, max_new_tokens=max_tokens)
    assert isinstance(agent, ModelAgent)
    sample = replies(
        agent,
        loaded.chat,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        mesh=MeshSettings(data=1).make(),
        seed=seed,
    )
    rows, failed = [], Counts()
    with Progress('replies', len(prompts)) as progress:
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            chats = [[Message(of['role'], of['content'].strip()) for of in row['messages']] for row in some]
            for row, reply in zip(some, sample(chats, 0), strict=True):
                if isinstance(reply, NoText):
                    failed[reply.cause] += 1
                    continue
                said = {'role': 'assistant', 'content': reply.text, 'truncated': reply.truncated}
                rows.append({**row, 'messages': [*row['messages'], said]})
            progress.update(len(some))
    return rows, failed


def with_user(assistant: str, user: str, *, people: int) -> tuple[Rows, Counts]:
    """An assistant's conversations with the first held-out people of its run, and the number of failed ones by cause.

    A simulator of the run plays them, with the seed and the draws of the run's matrix: every assistant meets the same,
    and conversations are those that the matrix has the scores of. A message that ended one is left out: the assistant
    never read it.

    Args:
        assistant: RUN/initial or RUN/ARM/seed-K.
        user: a name of `load.simulators`.

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
    mesh, size = scene.compute.mesh.make(), scene.settings.evaluation.batch_size
    with jax.set_mesh(mesh):
        simulator = for_sampling(fitting_simulator(scene, *known[user], examples), mesh)
        own = load_assistant(assistant).agent
    check_agents(simulator, own, scene.chat, scene.limits)
    rows, failed = [], Counts()
    with Progress('conversations', len(examples)) as progress:
        for start in range(0, len(examples), size):
            chosen = examples[start : start + size]
            batch, reasons = collect(
                simulator,
                own,
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
                messages = [{'role': role, 'content': text} for role, text in heard(row)]
                # Without an opening the example is a person, and not a text that several may have written.
                person = example.id if example.opening is None else None
                told = {'id': example.id, 'person': person, 'intent': example.intent, 'end': row['end_reason']}
                rows.append({**told, 'messages': messages})
            progress.update(len(chosen))
    return rows, failed
