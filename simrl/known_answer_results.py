"""What the stages of the known-answer experiment left -> results/*.json, report.html and pictures for TensorBoard."""

import collections
import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simrl import config as config_lib
from simrl.evaluation.people import claims_over_seeds, outcomes_of, summarise_people
from simrl.evaluation.report import console_table, figure_pngs, write_report
from simrl.evaluation.results import (
    INITIAL,
    PEOPLE,
    RESULTS_FOLDER,
    FidelityResult,
    MatrixResult,
    Message,
    PersonTalks,
    SimulatorFidelity,
    Talk,
    TimingsResult,
    TrainingCurve,
    TurnStatistics,
)
from simrl.evaluation.statistics import Estimate, cluster_bootstrap
from simrl.jobs import RESULT_FILE
from simrl.known_answer import KnownAnswer, Plan, likelihood_stage, matrix_stage, people_stage
from simrl.stages import stage_seconds
from simrl.training.metrics import Writer
from simrl.worlds.outcomes import vote


def finish(settings: KnownAnswer, workdir: pathlib.Path) -> None:
    """Writes all that comes out of a run whose stages are done; equal stages give equal files, but for timings."""
    plan = Plan(settings, workdir)
    results: dict[str, Any] = {}
    blocks = {assistant: _blocks(plan, assistant) for assistant in plan.assistants}
    outcomes = {assistant: outcomes_of(assistant, _rows(parts)) for assistant, parts in blocks.items()}
    people = [person for part in blocks[INITIAL] for person in part['outcomes']['person']]
    results['people'] = summarise_people(outcomes, people, vote=vote, dial=plan.settings.world.dial)
    results['claims'] = claims_over_seeds(outcomes, people, vote=vote)
    results['matrix'] = _matrix(plan, blocks)
    results['fidelity'] = _fidelity(plan, blocks[INITIAL])
    results['training'] = {
        name: _curve(_result(workdir, stage)) for name, stage in plan.assistants.items() if name != INITIAL
    }
    results['conversations'] = _talks(blocks)
    results['timings'] = TimingsResult({task.name: stage_seconds(workdir / task.name) for task in plan.tasks()})
    (workdir / RESULTS_FOLDER).mkdir(exist_ok=True)
    for name, value in results.items():
        (workdir / RESULTS_FOLDER / f'{name}.json').write_text(json.dumps(config_lib.to_dict(value), indent=1) + '\n')
    report = write_report(workdir)
    _show_in_tensorboard(workdir)
    print(console_table(workdir))
    print(f'report: {report}', flush=True)


def _result(workdir: pathlib.Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((workdir / stage / RESULT_FILE).read_text())
    return content


def _blocks(plan: Plan, assistant: str) -> list[dict[str, Any]]:
    """What an assistant was worth to people, block by block."""
    e = plan.settings.evaluation
    return [_result(plan.workdir, people_stage(assistant, block)) for block in range(e.people // e.block)]


def _rows(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Columns of several blocks as one row per conversation."""
    return [
        dict(zip(part['outcomes'], values, strict=True))
        for part in parts
        for values in zip(*part['outcomes'].values(), strict=True)
    ]


def _matrix(plan: Plan, blocks: Mapping[str, Sequence[Mapping[str, Any]]]) -> MatrixResult:
    def cell(parts: Sequence[Mapping[str, Any]]) -> Estimate:
        rows = _rows(parts)
        return cluster_bootstrap([row['satisfaction'] for row in rows], [row['person'] for row in rows])

    users = {
        name: [cell([_result(plan.workdir, matrix_stage(assistant, name))]) for assistant in plan.assistants]
        for name in plan.simulators
    }
    users[PEOPLE] = [cell(blocks[assistant]) for assistant in plan.assistants]
    return MatrixResult(
        users=tuple(users),
        assistants=tuple(plan.assistants),
        mean=tuple(tuple(cell.mean for cell in row) for row in users.values()),
        low=tuple(tuple(cell.low for cell in row) for row in users.values()),
        high=tuple(tuple(cell.high for cell in row) for row in users.values()),
        conversations=tuple(tuple(cell.num_observations for cell in row) for row in users.values()),
    )


def _fidelity(plan: Plan, initial: Sequence[Mapping[str, Any]]) -> FidelityResult:
    """How simulators talk with the initial assistant, beside people; and how well they predict people."""
    simulators = {}
    for name in plan.simulators:
        statistics = _turn_statistics([_result(plan.workdir, matrix_stage(INITIAL, name))])
        likelihood = _result(plan.workdir, likelihood_stage(name))
        nats = _nats_per_token(likelihood['log_likelihood'], likelihood['tokens'])
        simulators[name] = SimulatorFidelity(
            **config_lib.to_dict(statistics), perplexity=math.exp(nats.mean), nats_per_token=nats
        )
    return FidelityResult(people=_turn_statistics(initial), simulators=simulators)


def _nats_per_token(log_likelihood: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """The mean over tokens, with an interval over conversations."""
    mean = np.repeat(-np.array(log_likelihood) / np.array(tokens), tokens)
    return cluster_bootstrap(mean.tolist(), np.repeat(np.arange(len(tokens)), tokens).tolist())


def _turn_statistics(parts: Sequence[Mapping[str, Any]]) -> TurnStatistics:
    total: collections.Counter[str] = collections.Counter()
    for part in parts:
        total.update(part['statistics'])

    def rate(part: str, whole: str) -> float | None:
        return total[part] / total[whole] if total[whole] else None

    return TurnStatistics(
        words_per_message=rate('words', 'messages'),
        opening_attributes=rate('opening_attributes', 'conversations'),
        typo_rate=rate('mistyped', 'values'),
        against_intent=rate('against_intent', 'statements'),
        left=rate('left', 'conversations'),
        accepted=rate('accepted', 'conversations'),
        messages=rate('messages', 'conversations'),
    )


def _curve(result: Mapping[str, Any]) -> TrainingCurve:
    return TrainingCurve(
        step=result['step'],
        reward=result['reward/mean'],
        end_signal=result['rollout/end_signal'],
        kl=result.get('kl_k3'),  # not there without a reference
    )


def _talks(blocks: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[PersonTalks]:
    """The same people, from the same seed, with every assistant."""
    shown = []
    for number, first in enumerate(blocks[INITIAL][0]['shown']):
        talks = {}
        for assistant, parts in blocks.items():
            outcomes = {key: column[number] for key, column in parts[0]['outcomes'].items()}
            talks[assistant] = Talk(
                messages=tuple(Message(**message) for message in parts[0]['shown'][number]['messages']),
                satisfaction=outcomes['satisfaction'],
                share_met=outcomes['share_met'],
                end='accepted' if outcomes['accepted'] else 'left' if outcomes['left'] else 'turns',
            )
        shown.append(PersonTalks(first['person'], first['intent'], first['traits'], talks))
    return shown


def _show_in_tensorboard(workdir: pathlib.Path) -> None:
    """The report's pictures and table; what an earlier call wrote goes."""
    shutil.rmtree(workdir / 'tensorboard', ignore_errors=True)
    with Writer(workdir) as writer:
        for name, png in figure_pngs(workdir).items():
            writer.image(0, f'report/{name}', png, *png_size(png))
        table = '\n'.join(f'    {line}' for line in console_table(workdir).splitlines())
        writer.text(0, 'report/table', table)


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the IHDR chunk (PNG specification, section 11.2.2)."""
    return int.from_bytes(png[16:20], 'big'), int.from_bytes(png[20:24], 'big')
