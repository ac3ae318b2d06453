"""A store -> the files of a study's report.

1. `read_study`: events, participants, flags, the plan, and the look that this report is, which the store keeps.
2. `write_study`: analysis, report.html, reasons.html, figures/, results.json.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from simrl.evaluation.ranking import Ranking
from simrl.evaluation.report import gallery
from simrl.evaluation.report.report import write_page
from simrl.evaluation.results.measures import INITIAL, ExperimentResult
from simrl.evaluation.results.study import StudyPair, StudyResult
from simrl.evaluation.statistics import Estimate
from simrl.run.config import to_dict
from simrl.run.stage_files import named_errors, write_json
from simrl.study import screens
from simrl.study.analysis import FIRST_TURNS, Analysis, analyse, samples_of
from simrl.study.departures import departures
from simrl.study.events import STUDY, Mode, Stored
from simrl.study.flags import Flag
from simrl.study.looks import Look, counted, frozen_plan, is_stored, look_at, to_event
from simrl.study.participant import Participant, fold_all
from simrl.study.plan import read_plan
from simrl.study.report import figures, page, reasons
from simrl.study.report.settings import StudyReportSettings
from simrl.study.settings import PlanSettings
from simrl.study.store import ConflictError, Entry, Store, StoreError, read_events
from simrl.study.texts import Tasks, number_of
from simrl.study.votes import votes

RESULTS_FILE = 'results.json'
LOOKS = {
    'planned': 'It is a look that was planned{when}{before}.',
    'unplanned': 'It is a look that was not planned: its intervals do not have their level.',
    'rehearsal': 'It is a rehearsal, whose participants are no people.',
}


class NoStudyError(ValueError):
    """A store that has nobody to report on."""


@dataclasses.dataclass(frozen=True)
class Study:
    """All that a report is made of.

    Attributes:
        events: all of the store.
        participants: as of the look.
        flags: by participant; there is no entry of one without.
        departed: sentences on departures from the frozen plan.
    """

    mode: Mode
    events: Sequence[Stored]
    participants: Mapping[str, Participant]
    flags: Mapping[str, Sequence[Flag]]
    plan: PlanSettings
    look: Look
    departed: Sequence[str]


def read_study(settings: StudyReportSettings, tasks: Tasks) -> Study:
    """Reads a store. A look that is not in it yet is stored before anything is shown.

    Args:
        tasks: of the study.

    Raises:
        StoreError: the store cannot be read; or a look cannot be stored, for instance as a server has the store open.
        NoStudyError: nobody has arrived, or the tasks are of another study.
        NoLookError: no look at results by model is planned by now, and none was made.
        ConfigError: a changed plan is impossible.
    """
    events = read_events(settings.store)
    modes = {one.mode for one in fold_all(events).values()}
    mode: Literal['live', 'rehearsal'] = 'live' if 'live' in modes else 'rehearsal'  # a store is of one of the two
    if mode not in modes:
        raise NoStudyError(f'{settings.store}: expected participants, found none')
    changes = {name: getattr(settings, name) for name in ('level', 'primary', 'excluded_flags')}
    frozen = frozen_plan(events)
    plan = read_plan(frozen.plan if frozen else {})
    changed = {name: value for name, value in changes.items() if value is not None}
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **changed))
    look = look_at(events, plan, mode, settings.reason)
    if look.kind != 'rehearsal' and not look.number and not is_stored(look, events):
        with _opened(settings.store, mode) as store:
            events = store.events()
            look = look_at(events, plan, mode, settings.reason)
            events += _stored(store, events, look, mode)
    participants = fold_all(counted(events, look.until))
    own = [one for one in participants.values() if one.mode == mode]
    try:
        flags = screens.all_flags(own, tasks, plan.screens)
    except KeyError as error:
        raise NoStudyError(f'config.tasks: expected the tasks of the study, found none of the id {error}') from None
    departed = departures(events, plan.settings, look, mode)
    return Study(mode, events, participants, flags, plan.settings, look, departed)


def _opened(url: str, mode: Literal['live', 'rehearsal']) -> Store:
    try:
        return Store(url, mode)
    except StoreError as error:
        raise StoreError(
            f'{error}. A look at results is stored before they are shown: while the server runs, make it on the '
            'administrators’ page Results'
        ) from error


def _stored(store: Store, events: Sequence[Stored], look: Look, mode: Mode) -> tuple[Stored, ...]:
    """Stores a look at results by model."""
    version = max((stored.version for stored in events if stored.participant == STUDY), default=0) + 1
    looked = to_event(look, fold_all(events).values(), mode)
    (stored,) = store.append([Entry(STUDY, version, time.time(), (looked,))])
    if isinstance(stored, ConflictError):
        raise stored
    return stored


def write_study(study: Study, settings: StudyReportSettings, tasks: Tasks) -> tuple[pathlib.Path, Analysis]:
    """Writes report.html, reasons.html, figures/ and results.json into a folder, which is made if it is missing.

    Equal studies give equal bytes.

    Returns:
        The path of report.html, and what is in it.
    """
    frozen = frozen_plan(study.events)
    pairs = read_plan(frozen.plan).pairs if frozen else ()
    found = votes(study.participants.values(), study.mode, screens.names_of(study.flags), pairs)
    analysis = analyse(
        study.participants.values(),
        found,
        study.plan,
        mode=study.mode,
        pairs=pairs,
        shares=study.look.shares,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    names = {kind.id: kind.name for kind in tasks.types}
    names |= {task.id: task.title for kind in tasks.types for task in kind.tasks}
    drawings = figures.drawings_of(analysis, names)
    with named_errors(settings.output):
        settings.output.mkdir(parents=True, exist_ok=True)
    gallery.write_figures(gallery.pngs(drawings), drawings.values(), settings.output)
    text = page.report_page(analysis, drawings, study.plan, frozen, study.departed, _about(study), names)
    write_page(
        settings.output / page.REASONS_FILE,
        reasons.reasons_page(samples_of(found, study.plan), found, names, study.flags),
    )
    write_json(settings.output / RESULTS_FILE, plain(analysis, study))
    return write_page(settings.output / page.REPORT_FILE, text), analysis


def _about(study: Study) -> list[str]:
    """Sentences on the look and on when participants came."""
    own = [one for one in study.participants.values() if one.mode == study.mode]
    dates = page.dates(min(one.began_at for one in own), max(one.seen_at for one in own))
    number, planned = study.look.completed, study.plan.participants
    who = (
        f'{number:,} of {planned:,} planned participants' if study.mode == 'live' else number_of(number, 'participant')
    )
    share = study.look.shares[-1]
    when = ', at the end' if share == 1 else f', at {share:.0%} of the participants'
    return [
        f'{who} completed, {dates}.',
        LOOKS[study.look.kind].format(when=when, before=', and made before' if study.look.number else ''),
    ]


def plain(analysis: Analysis, study: Study) -> dict[str, Any]:
    """The analysis as a JSON object, pairs by FIRST:SECOND."""
    ranking: Any = analysis.ranking
    if isinstance(ranking, Ranking):
        ranking = vars(ranking) | {'differences': {':'.join(two): of for two, of in ranking.differences.items()}}
    samples = {name: {':'.join(pair): of for pair, of in rates.items()} for name, rates in analysis.samples.items()}
    frozen = frozen_plan(study.events)
    whole: dict[str, Any] = to_dict(
        {
            'mode': study.mode,
            'plan': study.plan,
            'plan_hash': None if frozen is None else frozen.plan_hash,
            'look': study.look,
            'departures': study.departed,
            **vars(analysis),
            'samples': samples,
            'ranking': ranking,
        }
    )
    return whole


def console_lines(analysis: Analysis, study: Study) -> list[str]:
    """The results as text: a sentence for each pair, and departures from the plan."""
    said = [page.sentence(pair, len(analysis.pairs)) for pair in analysis.pairs]
    return [*said, *_about(study), *(f'departs from the plan: {text}' for text in study.departed)]


def study_result(
    study: Study, analysis: Analysis, report: pathlib.Path, run: ExperimentResult, assistants: Sequence[str]
) -> StudyResult:
    """The study as a run's report shows it.

    Args:
        report: the study's report.
        run: whose assistants the models were.
        assistants: MODEL=ASSISTANT of those that are not found by name.

    Raises:
        NoStudyError: a model is none of the run's assistants.
    """
    given = dict(text.split('=', 1) for text in assistants)
    known = run.by_name()
    pairs = []
    for pair in analysis.pairs:
        names = []
        for model in (pair.first, pair.second):
            name = given.get(model, known.get(model))
            if name is None or name not in (INITIAL, *run.runs):
                several = len(run.assistants_of(model))
                found = repr(name) if name else f'{several} of that arm' if several else 'none of that name'
                raise NoStudyError(
                    f'config.assistants: expected {model}=ASSISTANT, one of {", ".join([INITIAL, *run.runs])}, '
                    f'found {found}'
                )
            names.append(name)
        estimate = figures.known(pair.rate)
        if estimate is None:
            continue
        alone = figures.known(analysis.samples[FIRST_TURNS].get((pair.first, pair.second)))
        if names[0] == INITIAL:
            names, estimate, alone = names[::-1], _other_way(estimate), alone and _other_way(alone)
        pairs.append(
            StudyPair(
                first=names[0],
                second=names[1],
                participants=pair.rate.participants,
                votes=pair.rate.votes,
                win_rate=estimate,
                first_turns=alone,
                p_value=pair.rate.p_value,
                adjusted_p=pair.adjusted_p,
                significant=pair.significant,
            )
        )
    return StudyResult(str(report.resolve()), study.mode, analysis.unit, len(study.departed), tuple(pairs))


def _other_way(estimate: Estimate) -> Estimate:
    """The win rate of the other model."""
    low, high = (None if x is None else 1 - x for x in (estimate.high, estimate.low))
    return dataclasses.replace(estimate, mean=1 - estimate.mean, low=low, high=high)
