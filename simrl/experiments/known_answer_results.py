"""What the stages of the known-answer experiment left -> results/*.json, report.html and pictures for TensorBoard."""

import collections
import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from simrl.evaluation.comparisons import claims_over_seeds
from simrl.evaluation.people import Outcomes, compare, outcomes_of, summarise_people
from simrl.evaluation.report.report import console_table, figure_pngs, write_report
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
from simrl.evaluation.statistics import Estimate, cluster_bootstraps, cluster_ratio
from simrl.experiments.jobs import RESULT_FILE
from simrl.experiments.known_answer import KnownAnswer, Plan, likelihood_stage, matrix_stage, people_stage
from simrl.run import config as config_lib
from simrl.run.metrics import Writer
from simrl.run.stage_files import write_json
from simrl.run.stages import stage_seconds
from simrl.worlds.concierge.outcomes import vote

T = TypeVar('T')


def finish(settings: KnownAnswer, workdir: pathlib.Path) -> None:
    """Writes all that comes out of a run whose stages are done; equal stages give equal files, but for timings."""
    plan = Plan(settings, workdir)
    results: dict[str, Any] = {}
    blocks = {assistant: _blocks(plan, assistant) for assistant in plan.assistants}
    outcomes = outcomes_on_people(plan)
    people = [person for part in blocks[INITIAL] for person in part['outcomes']['person']]
    compared = compare(outcomes, vote=vote)
    met = {assistant: _met(plan, assistant) for assistant in plan.assistants}
    means = {assistant: {user: float(x.mean()) for user, x in users.items()} for assistant, users in met.items()}
    results['people'] = summarise_people(outcomes, compared, people, dial=plan.settings.world.dial)
    results['claims'] = claims_over_seeds(outcomes, compared, people, met=means)
    results['matrix'] = _matrix(met, outcomes)
    results['fidelity'] = _fidelity(plan, blocks[INITIAL])
    results['training'] = {
        name: _curve(_result(workdir, stage)) for name, stage in plan.assistants.items() if name != INITIAL
    }
    results['conversations'] = _talks(blocks)
    results['timings'] = TimingsResult({task.name: stage_seconds(workdir / task.name) for task in plan.tasks()})
    for name, value in results.items():
        write_json(workdir / RESULTS_FOLDER / f'{name}.json', config_lib.to_dict(value))
    report = write_report(workdir)
    _show_in_tensorboard(workdir)
    print(console_table(workdir))
    print(f'report: {report}', flush=True)


def outcomes_on_people(plan: Plan) -> dict[str, Outcomes]:
    """What every assistant was worth to the same people, in their order."""
    return {assistant: outcomes_of(assistant, _rows(_blocks(plan, assistant))) for assistant in plan.assistants}


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


def _met(plan: Plan, assistant: str) -> dict[str, np.ndarray]:
    """Simulator -> [conversations] satisfaction with one assistant, the same people played throughout."""
    return {
        user: np.array(_result(plan.workdir, matrix_stage(assistant, user))['outcomes']['satisfaction'])
        for user in plan.simulators_met(assistant)
    }


def _matrix(met: Mapping[str, Mapping[str, np.ndarray]], outcomes: Mapping[str, Outcomes]) -> MatrixResult:
    by_kind = {assistant: _by_kind(users) for assistant, users in met.items()}
    cells = {user: [np.mean(users[user], 0) for users in by_kind.values()] for user in by_kind[INITIAL]}
    cells[PEOPLE] = [found.satisfaction for found in outcomes.values()]
    estimates = {user: cluster_bootstraps(row, range(len(row[0]))) for user, row in cells.items()}
    conversations = {user: [sum(map(len, users[user])) for users in by_kind.values()] for user in by_kind[INITIAL]}
    conversations[PEOPLE] = [len(row) for row in cells[PEOPLE]]
    return MatrixResult(
        users=tuple(cells),
        assistants=tuple(met),
        mean=tuple(tuple(cell.mean for cell in row) for row in estimates.values()),
        low=tuple(tuple(cell.low for cell in row) for row in estimates.values()),
        high=tuple(tuple(cell.high for cell in row) for row in estimates.values()),
        conversations=tuple(map(tuple, conversations.values())),
    )


def _by_kind(simulators: Mapping[str, T]) -> dict[str, list[T]]:
    """Simulator -> what its trainings have, by seed where it is trained anew for each."""
    grouped: dict[str, list[T]] = {}
    for name, value in simulators.items():
        grouped.setdefault(name.partition('/')[0], []).append(value)
    return grouped


def _fidelity(plan: Plan, initial: Sequence[Mapping[str, Any]]) -> FidelityResult:
    """How simulators talk with the initial assistant, beside people; and how well they predict people."""
    fidelity = {}
    for name, trained in _by_kind({name: name for name in plan.simulators}).items():
        statistics = _turn_statistics([_result(plan.workdir, matrix_stage(INITIAL, one)) for one in trained])
        nats = _nats_per_token([_result(plan.workdir, likelihood_stage(one)) for one in trained])
        fidelity[name] = SimulatorFidelity(
            **config_lib.to_dict(statistics), perplexity=math.exp(nats.mean), nats_per_token=nats
        )
    return FidelityResult(people=_turn_statistics(initial), simulators=fidelity)


def _nats_per_token(likelihoods: Sequence[Mapping[str, Sequence[float]]]) -> Estimate:
    """The mean over tokens and trainings of one simulator, with an interval over conversations, the same for all."""
    nats = -np.mean([found['log_likelihood'] for found in likelihoods], 0)
    return cluster_ratio(nats, np.array(likelihoods[0]['tokens']))


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
        no_spread=_shares(result, 'groups_zero_variance', 'groups'),
    )


def _shares(result: Mapping[str, Any], part: str, whole: str) -> tuple[float, ...] | None:
    """By step; None where the run has no such numbers."""
    if part not in result:
        return None
    return tuple(x / n if n else 0.0 for x, n in zip(result[part], result[whole], strict=True))


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
