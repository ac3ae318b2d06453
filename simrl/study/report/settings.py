"""Settings of a study's report."""

import dataclasses
import pathlib
from typing import Literal

from simrl.run.config import NO_EFFECT


@dataclasses.dataclass(frozen=True)
class StudyReportSettings:
    """An analysis follows the plan that the store has frozen; where it departs, the report states it."""

    # A database by its URL: sqlite:///FILE or postgresql://USER@HOST/NAME; its server may run meanwhile.
    store: str = dataclasses.field(default='sqlite:///study.sqlite', metadata=NO_EFFECT)
    output: pathlib.Path = dataclasses.field(default=pathlib.Path('runs/study_report'), metadata=NO_EFFECT)
    tasks: pathlib.Path | None = None  # the study's own file of tasks, for their titles; None: those of simrl
    # For a look at results by model before the planned number has completed, where no interim look is planned by then.
    # The store keeps the look and its reason.
    reason: str = ''
    # Each of the following changes the frozen plan where it is not None.
    level: float | None = None  # nominal coverage of intervals, over all pairs (Holm)
    primary: Literal['participant', 'vote'] | None = None  # unit that the primary win rate weighs alike
    excluded_flags: tuple[str, ...] | None = None  # flags whose participants the primary analysis leaves out
    # Of a run directory: its report shows the study's win rates of its assistants, beside those of the other judges.
    run: pathlib.Path | None = None
    # MODEL=ASSISTANT of the run, such as trained=persona/seed-0. Without one a model's name is the assistant's or the
    # arm's, - in the place of /.
    assistants: tuple[str, ...] = ()
    resamples: int = 10_000  # of bootstraps
    seed: int = 0  # of bootstraps

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f'StudyReportSettings.resamples: expected at least 100, found {self.resamples!r}')
        for text in self.assistants:
            if not all(text.partition('=')):
                raise ValueError(f'StudyReportSettings.assistants: expected MODEL=ASSISTANT, found {text!r}')
