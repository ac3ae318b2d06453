"""Win rates of a blind user study of a run's assistants, beside those that the run's own measures find."""

import os
import pathlib
from collections.abc import Mapping, Sequence

from simrl.evaluation.report import page, summary
from simrl.evaluation.report.drawing import Look, look_of
from simrl.evaluation.report.page import Cell
from simrl.evaluation.report.tables import estimate_cell
from simrl.evaluation.results.files import Results
from simrl.evaluation.results.measures import INITIAL, MeasureResult
from simrl.evaluation.results.study import StudyPair, StudyResult
from simrl.evaluation.statistics import Estimate

TITLE = 'Preferred in a blind user study'
REHEARSAL = 'A rehearsal: its participants are models or scripts, and no people. '
ABOUT = (
    'Win rates are the first assistant’s over the second, ties ½. Those of the study are means over {unit}s, with '
    'intervals over participants; Holm: adjusted for the pairs of the study. From the second turn on replies share a '
    'history; first turns do not. Those of the measures are of the same checkpoints, with intervals over examples; a '
    'measure compares with the initial assistant alone. All are of these checkpoints only: other training seeds may '
    'differ.'
)


def section(results: Results, study: StudyResult, looks: Mapping[str, Look], output: pathlib.Path) -> str:
    """The section of the report; `output`: the folder that the report is written into, for a link."""
    header = ('pair', 'study', 'p', 'Holm p', 'significant', 'first turns alone', 'participants', 'votes')
    measures = list(results.measures.values())
    rows: list[Sequence[str | Cell]] = [
        (
            Cell(f'{pair.first} over {pair.second}', dot=look_of(looks, pair.first).colour),
            estimate_cell(pair.win_rate),
            summary.p_value(pair.p_value),
            *_significance(pair),
            estimate_cell(pair.first_turns),
            f'{pair.participants:,}',
            f'{pair.votes:,}',
            *(estimate_cell(by_measure(measure, pair.first, pair.second)) for measure in measures),
        )
        for pair in study.pairs
    ]
    departs = f'Departures of the study from its frozen plan: {study.departures}. ' if study.departures else ''
    return page.section(
        TITLE,
        page.table((*header, *(f'win rate: {measure.words.title}' for measure in measures)), rows),
        page.paragraph(
            f'{REHEARSAL if study.mode == "rehearsal" else ""}{departs}{ABOUT.format(unit=study.unit)}', 'note'
        ),
        page.link(os.path.relpath(study.report, output.resolve()), 'The report of the study'),
    )


def _significance(pair: StudyPair) -> tuple[str | Cell, Cell]:
    """The adjusted p-value, and whether it is significant: which one participant, or some who agree, cannot say."""
    if pair.p_value is None:
        return '–', Cell('cannot be said', under='one participant' if pair.participants == 1 else 'all alike')
    return summary.p_value(pair.adjusted_p), Cell('yes' if pair.significant else 'no', shade=float(pair.significant))


def by_measure(measure: MeasureResult, first: str, second: str) -> Estimate | None:
    """A measure's win rate of a checkpoint over the initial assistant; None of other pairs."""
    found = measure.assistants.get(first)
    return found.win_rate if found and second == INITIAL else None
