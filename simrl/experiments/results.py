"""Stages' outputs -> results/*.json, report.html, TensorBoard pictures and a console table, for every scene.

`write_results(spec, workdir)` runs once all stages are done. `ResultsSpec` says which stages there are and what their
numbers are called; nothing else is known of how they ran. Every stage named in it has a `result.json`:

- of a measure and of the matrix: {'outcomes': columns, 'statistics': counts, 'shown': conversations}. Columns:
  'example', 'cluster', 'score', 'end', 'assistant_turns', 'truncated', 'user_truncated', and the scene's own: numbers
  ('share_met'), or labels ('first_act').
- of RL: columns by logged step
- of a likelihood: {'log_likelihood': [...], 'tokens': [...]}, one entry per row
"""

import dataclasses
from collections.abc import Mapping, Sequence

from simrl.evaluation.results import INITIAL, Arm, MeasureWords
from simrl.evaluation.win_rate import Prefer


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
    likelihood: str | None  # the stage with its likelihood of people's messages; None off the device


@dataclasses.dataclass(frozen=True)
class MeasureSpec:
    """A measure of all assistants on the same examples.

    Attributes:
        words: the names of its numbers, for the report.
        stages: of each assistant, 'initial' first; together they hold its examples, in an order equal for all.
        prefer: the probability that the first of two scores is preferred; None: the higher one is, ties count 1/2.
    """

    words: MeasureWords
    stages: Mapping[str, Sequence[str]]
    prefer: Prefer | None = None


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """Assistants with simulators.

    Attributes:
        score: the name of the score of these conversations, for the report.
        stages: assistant -> simulator -> stage. A trained assistant meets the simulators of its own seed, 'initial'
            all of them.
        people: the measure that has the same score for conversations with people; it becomes the last row. None:
            nobody but simulators talks with the assistants.
    """

    score: str
    stages: Mapping[str, Mapping[str, str]]
    people: str | None = None


@dataclasses.dataclass(frozen=True)
class ResultsSpec:
    """All that results are made of.

    Attributes:
        arms: in the order of the config.
        assistants: the trained ones, by 'ARM/seed-K'.
        measures: the first one is the headline.
        simulators: by ARM, or by 'ARM/seed-K' where trained anew for each training seed.
        matrix: assistants with simulators; None where they do not meet.
        rates: statistics of users' messages by name, each the ratio of two counts of a stage's 'statistics'.
        caution: what the numbers do not show, as sentences for the top of the report.
        seconds: of each stage.
    """

    arms: Mapping[str, Arm]
    assistants: Mapping[str, AssistantSpec]
    measures: Mapping[str, MeasureSpec]
    simulators: Mapping[str, SimulatorSpec]
    matrix: MatrixSpec | None
    rates: Mapping[str, tuple[str, str]]
    caution: str
    seconds: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, measure in self.measures.items():
            if list(measure.stages) != [INITIAL, *self.assistants]:
                raise ValueError(
                    f'ResultsSpec.measures.{name}.stages: expected {[INITIAL, *self.assistants]}, '
                    f'found {list(measure.stages)}'
                )
