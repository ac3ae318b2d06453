"""Stages' outputs -> results/*.json, report.html, TensorBoard pictures and a console table, for every scene.

`write_results(spec, workdir)` runs once all stages are done. `ResultsSpec` says which stages there are and what their
numbers are called; nothing else is known of how they ran. Every stage named in it has a `result.json`:

- of a measure and of the matrix: {'outcomes': columns, 'statistics': counts, 'shown': conversations}. Columns:
  'example', 'cluster', 'cause', 'score', 'end', 'assistant_turns', 'truncated', 'user_truncated', 'assistant_tokens',
  and the scene's own: numbers ('share_met'), or labels ('first_act'). Where a conversation has no score, 'cause' says
  why and the columns after it are null; it is '' elsewhere. Stages of an earlier version have no 'cause', and none
  without a score; nor have they 'assistant_tokens'. Of a score by a panel of judges each one's is 'judge_NAME'.
- of RL: columns by logged step
- of forecasts: see `forecasts`
- of a likelihood: {'log_likelihood': [...], 'tokens': [...], 'source': [...]}, one entry per row; null for a simulator
  off the device; stages of an earlier version have no 'source'
- of a replay: counts; `turns.jsonl.gz` beside it has the turns
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simrl.evaluation.comparisons import Runs, compare_arms
from simrl.evaluation.fidelity import measure as fidelity_lib
from simrl.evaluation.fidelity.annotators import Annotators
from simrl.evaluation.fidelity.likelihood import nats_per_token
from simrl.evaluation.fidelity.turns import read_turns
from simrl.evaluation.matrix import matrix_of
from simrl.evaluation.outcomes import Outcomes, compare, outcomes_of, panel_votes, summarise, with_common_parts
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.conversations import ConversationsResult, Message, ShownConversation, ShownExample
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import (
    INITIAL,
    Arm,
    ExperimentResult,
    MeasureResult,
    MeasureScores,
    MeasureWords,
    Run,
    ScoresResult,
)
from simrl.evaluation.results.simulators import FidelityResult, MatrixResult, SimulatorFidelity
from simrl.evaluation.results.training import TimingsResult, TrainingCurve, TrainingResult, ValidationCurve
from simrl.evaluation.statistics import cluster_numbers
from simrl.evaluation.win_rate import Prefer, prefer_higher
from simrl.experiments.forecast_results import ForecastSpec, forecast_result
from simrl.experiments.outputs import read_result
from simrl.experiments.replays import TURNS_FILE
from simrl.run.metrics import CONVERSATIONS_FOLDER, Writer

RL_CONVERSATIONS = 'rl.jsonl'  # in an RL stage's folder of conversations
ENDS = 'rollout/end_'  # how the shares of conversations by reason for ending begin


@dataclasses.dataclass(frozen=True)
class AssistantSpec:
    """A trained assistant."""

    arm: str
    seed: int
    rl: str  # its RL stage


@dataclasses.dataclass(frozen=True)
class SimulatorSpec:
    """The simulator of an arm; one of several where it is trained anew for each training seed."""

    arm: str
    likelihood: str | None  # the stage with its likelihood of people's messages; None: it is not done
    replay: str | None = None  # the stage in which it replays people's conversations; None: none, or not done


@dataclasses.dataclass(frozen=True)
class MeasureSpec:
    """A measure of all assistants on the same examples.

    Attributes:
        words: the names of its numbers, for the report.
        stages: of each assistant, 'initial' first; together they hold its examples, in an order equal for all.
        prefer: the probability that the first of two scores is preferred.
    """

    words: MeasureWords
    stages: Mapping[str, Sequence[str]]
    prefer: Prefer = prefer_higher


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """Assistants with simulators.

    Attributes:
        score: the name of the score of these conversations, for the report.
        stages: assistant -> simulator -> stage. A trained assistant meets the simulators of its own seed, 'initial'
            all of them. Of a run that is not finished, the assistants that have met all of them.
        people: the measure that has the same score for conversations with people; it becomes the last row.
        times: see `MatrixResult`.
    """

    score: str
    stages: Mapping[str, Mapping[str, str]]
    people: str | None = None
    times: int = 1


@dataclasses.dataclass(frozen=True)
class ResultsSpec:
    """All that results are made of.

    Attributes:
        arms: in the order of the config.
        assistants: the trained ones, by 'ARM/seed-K'.
        measures: the first one is the headline.
        simulators: by ARM, or by 'ARM/seed-K' where trained anew for each training seed.
        matrix: assistants with simulators.
        rates: statistics of users' messages by name, each the ratio of two counts of a stage's 'statistics'.
        caution: what the numbers do not show, as sentences for the top of the report.
        seconds: of each stage.
        forecast: of simulators' utility; None: nothing was forecast.
        annotators: what describes replayed turns.
    """

    arms: Mapping[str, Arm]
    assistants: Mapping[str, AssistantSpec]
    measures: Mapping[str, MeasureSpec]
    simulators: Mapping[str, SimulatorSpec]
    matrix: MatrixSpec
    rates: Mapping[str, tuple[str, str]]
    caution: str
    seconds: Mapping[str, float]
    forecast: ForecastSpec | None = None
    annotators: Annotators = dataclasses.field(default_factory=Annotators)

    def __post_init__(self) -> None:
        for name, measure in self.measures.items():
            if list(measure.stages) != [INITIAL, *self.assistants]:
                raise ValueError(
                    f'ResultsSpec.measures.{name}.stages: expected {[INITIAL, *self.assistants]}, '
                    f'found {list(measure.stages)}'
                )
            if name in (*result_files.FILES, *result_files.ADDED):
                raise ValueError(f'ResultsSpec.measures: {name!r} is the name of another file of results')
        if len(oracles := [name for name, arm in self.arms.items() if arm.oracle]) > 1:
            raise ValueError(f'ResultsSpec.arms: expected at most one oracle, found {", ".join(oracles)}')

    @property
    def runs(self) -> Runs:
        """The assistants of each arm that has any, by ascending seed."""
        by_arm: dict[str, dict[int, str]] = {arm: {} for arm in self.arms}
        for name, assistant in sorted(self.assistants.items(), key=lambda item: item[1].seed):
            by_arm[assistant.arm][assistant.seed] = name
        return {arm: runs for arm, runs in by_arm.items() if runs}

    @property
    def oracle(self) -> str | None:
        return next((name for name, arm in self.arms.items() if arm.oracle), None)


def write_results(spec: ResultsSpec, workdir: pathlib.Path) -> None:
    """Writes and prints the results of a run; equal stages give equal files, except for timings."""
    results = results_of(spec, workdir)
    result_files.write(results, workdir)
    stages = {name: assistant.rl for name, assistant in spec.assistants.items()}
    report, table = publish(results, workdir, kept_conversations(workdir, stages))
    print(table)
    print(f'report: {report}', flush=True)


def publish(results: Results, workdir: pathlib.Path, kept: Mapping[str, pathlib.Path]) -> tuple[pathlib.Path, str]:
    """Writes the report of a run into it, and its figures and table for TensorBoard; returns its path, and the table.

    Args:
        kept: of `kept_conversations`.
    """
    from simrl.evaluation.report.report import console_table, write_report  # imports matplotlib: a second

    report, pictures = write_report(results, workdir, kept=kept)
    table = console_table(results, result_files.read_added(workdir))
    with Writer(workdir) as writer:
        writer.truncate_events({}, 0)  # of an earlier call
        for name, png in pictures.items():
            writer.image(0, f'report/{name}', png, *png_size(png))
        writer.text(0, 'report/table', '\n'.join(f'    {line}' for line in table.splitlines()))
    return report, table


def kept_conversations(workdir: pathlib.Path, stages: Mapping[str, str]) -> dict[str, pathlib.Path]:
    """The file of the conversations that each assistant's RL stage keeps; `stages` by assistant."""
    return {name: workdir / stage / CONVERSATIONS_FOLDER / RL_CONVERSATIONS for name, stage in stages.items()}


def results_of(spec: ResultsSpec, workdir: pathlib.Path) -> Results:
    """The results of a run whose stages are done."""
    parts = {
        name: {who: [read_result(workdir / stage) for stage in stages] for who, stages in measure.stages.items()}
        for name, measure in spec.measures.items()
    }
    outcomes = {
        name: with_common_parts({who: outcomes_of(who, _columns(blocks)) for who, blocks in found.items()})
        for name, found in parts.items()
    }
    met = {
        who: {simulator: read_result(workdir / stage) for simulator, stage in stages.items()}
        for who, stages in spec.matrix.stages.items()
    }
    people = parts[spec.matrix.people][INITIAL] if spec.matrix.people else []
    measures = {name: _measure(spec, name, found) for name, found in outcomes.items()}
    headline = measures[next(iter(spec.measures))]
    return Results(
        experiment=ExperimentResult(
            arms=dict(spec.arms),
            runs={name: Run(x.arm, x.seed) for name, x in spec.assistants.items()},
            measures=tuple(spec.measures),
            caution=spec.caution,
        ),
        measures=measures,
        scores=ScoresResult(
            {
                name: MeasureScores(
                    tuple(cluster_numbers(found[INITIAL].clusters).tolist()),
                    {
                        who: tuple(None if math.isnan(score) else score for score in x.score.tolist())
                        for who, x in found.items()
                    },
                )
                for name, found in outcomes.items()
            }
        ),
        matrix=_matrix(spec, met, outcomes),
        fidelity=_fidelity(spec, workdir, met.get(INITIAL, {}), people),
        training=TrainingResult({name: _curve(read_result(workdir / x.rl)) for name, x in spec.assistants.items()}),
        conversations=ConversationsResult({name: _shown(found, outcomes[name]) for name, found in parts.items()}),
        timings=TimingsResult(dict(spec.seconds)),
        forecast=None if spec.forecast is None else forecast_result(spec.forecast, workdir, headline),
    )


def _columns(blocks: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The columns of several stages, one after the other: those that all have, as earlier versions have fewer."""
    found = [{'cause': [''] * len(block['outcomes']['example']), **block['outcomes']} for block in blocks]
    names = [name for name in found[0] if all(name in columns for columns in found)]
    return {name: [x for columns in found for x in columns[name]] for name in names}


def _measure(spec: ResultsSpec, name: str, outcomes: Mapping[str, Outcomes]) -> MeasureResult:
    compared = compare(outcomes, spec.measures[name].prefer)
    arms, differences = compare_arms(outcomes, compared, spec.runs, spec.oracle)
    initial = outcomes[INITIAL]
    return MeasureResult(
        name=name,
        words=spec.measures[name].words,
        examples=len(initial.examples),
        clusters=len(set(initial.clusters)),
        assistants=summarise(outcomes, compared),
        arms=arms,
        differences=differences,
        without_outcome=int((~np.any([found.judged for found in outcomes.values()], axis=0)).sum()),
        votes=panel_votes([*outcomes.values()]),
    )


def _matrix(
    spec: ResultsSpec,
    met: Mapping[str, Mapping[str, Mapping[str, Any]]],
    outcomes: Mapping[str, Mapping[str, Outcomes]],
) -> MatrixResult | None:
    if not met.get(INITIAL):
        return None
    matrix = spec.matrix
    runs = {arm: {seed: who for seed, who in assistants.items() if who in met} for arm, assistants in spec.runs.items()}
    return matrix_of(
        {
            who: {simulator: outcomes_of(f'{who}/{simulator}', _columns([found])) for simulator, found in users.items()}
            for who, users in met.items()
        },
        {name: simulator.arm for name, simulator in spec.simulators.items()},
        {arm: assistants for arm, assistants in runs.items() if assistants},
        spec.arms,
        score=matrix.score,
        times=matrix.times,
        people=None if matrix.people is None else (matrix.people, outcomes[matrix.people]),
    )


def _by_arm(spec: ResultsSpec, simulators: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Values by simulator -> lists by arm: one value per training of its simulator."""
    grouped: dict[str, list[Any]] = {}
    for name, value in simulators.items():
        grouped.setdefault(spec.simulators[name].arm, []).append(value)
    return grouped


def _fidelity(
    spec: ResultsSpec,
    workdir: pathlib.Path,
    initial: Mapping[str, Mapping[str, Any]],
    people: Sequence[Mapping[str, Any]],
) -> FidelityResult:
    """Simulators beside people: what they say to the initial assistant and in people's place, likelihoods of people."""
    fidelity = {}
    replayed = any(simulator.replay for simulator in spec.simulators.values())
    tools = fidelity_lib.make_tools(spec.annotators) if replayed else None
    for arm, names in _by_arm(spec, {name: name for name in spec.simulators}).items():
        done = [stage for name in names if (stage := spec.simulators[name].likelihood) is not None]
        stages = [stage for name in names if (stage := spec.simulators[name].replay)]
        if not done and not stages:
            continue
        nats, by_source = nats_per_token([read_result(workdir / stage) for stage in done])
        turns = [turn for stage in stages for turn in read_turns(workdir / stage / TURNS_FILE)]
        fidelity[arm] = SimulatorFidelity(
            perplexity=math.exp(nats.mean) if nats else None,
            nats_per_token=nats,
            statistics=_rates(spec, [initial[name] for name in names if name in initial]),
            nats_by_source=by_source,
            replayed=fidelity_lib.measure(turns, tools) if turns and tools else {},
        )
    return FidelityResult(people=_rates(spec, people), simulators=fidelity)


def _rates(spec: ResultsSpec, parts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    total: collections.Counter[str] = collections.Counter()
    for part in parts:
        total.update(part['statistics'])
    return {name: total[part] / total[whole] if total[whole] else None for name, (part, whole) in spec.rates.items()}


def _curve(result: Mapping[str, Any]) -> TrainingCurve:
    zero_variance = None
    if 'groups_zero_variance' in result:
        pairs = zip(result['groups_zero_variance'], result['groups'], strict=True)
        zero_variance = tuple(x / n if n else None for x, n in pairs)

    def column(name: str) -> tuple[float | None, ...] | None:
        return tuple(result[name]) if name in result else None

    return TrainingCurve(
        step=tuple(result['step']),
        reward=tuple(result['reward/mean']),
        end_signal=tuple(result['rollout/end_signal']),
        kl=column('kl_k3'),  # absent without a reference
        zero_variance=zero_variance,
        validation=ValidationCurve(**result['validation']) if 'validation' in result else None,
        message_tokens=column('rollout/message_tokens_assistant'),
        truncated=column('rollout/truncated_assistant'),
        unjudged=column('reward/unjudged'),
        ends={name.removeprefix(ENDS): tuple(values) for name, values in result.items() if name.startswith(ENDS)},
    )


def _shown(
    blocks: Mapping[str, Sequence[Mapping[str, Any]]], outcomes: Mapping[str, Outcomes]
) -> tuple[ShownExample, ...]:
    """The same examples with every assistant that has an outcome on them."""
    shown = {who: {x['example']: x for block in found for x in block['shown']} for who, found in blocks.items()}
    examples = []
    for example, first in shown[INITIAL].items():
        row = outcomes[INITIAL].examples.index(example)
        conversations = {
            who: ShownConversation(
                messages=tuple(Message(**message) for message in found[example]['messages']),
                score=float(outcomes[who].score[row]),
                parts={name: float(values[row]) for name, values in outcomes[who].parts.items()},
                end=outcomes[who].end[row],
            )
            for who, found in shown.items()
            if example in found
        }
        examples.append(ShownExample(example, first['intent'], first['traits'], conversations))
    return tuple(examples)


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the IHDR chunk (PNG specification, section 11.2.2)."""
    return int.from_bytes(png[16:20], 'big'), int.from_bytes(png[20:24], 'big')
