"""A study that runs, as administrators see it: its progress, and conversations without the models' names.

Nothing here depends on which model was preferred, nor on which one was on which side.
"""

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

from markupsafe import Markup

from simrl.evaluation.power import UnreachableError
from simrl.study.assignment import counts
from simrl.study.events import Choice, Conduct, Mode, Replied
from simrl.study.participant import Participant, Talk, Turn, completed
from simrl.study.plan import Clustering, Plan, Size, assumed, blind_clustering, planned_size
from simrl.study.render import to_html
from simrl.study.settings import StudySettings
from simrl.study.texts import Tasks
from simrl.study.votes import votes

NAMES: Mapping[Choice, str] = {'left': 'A', 'tie': 'tie', 'right': 'B'}
WITHHELD = Markup('<p class="soft">Withheld: one of the two replies may name its model.</p>')


Standing = Literal['completed', 'live', 'left', 'excluded']
Count = collections.Counter[Standing]


def standing(state: Participant, now: float, gone_seconds: float) -> Standing:
    """Sorts a participant who is no preview: those who fill a place completed or are live, others are out."""
    if counts(state, now, gone_seconds):
        return 'completed' if state.outcome == 'completed' else 'live'
    return 'excluded' if state.is_excluded else 'left'


@dataclasses.dataclass(frozen=True)
class Progress:
    """The participants of a study's mode.

    Attributes:
        total: of all who arrived.
        cells: by pair (FIRST:SECOND) and id of the document type; of the config's pairs, then of earlier ones.
        tasks: by id of the task.
        ends: who is not under way, by outcome.
        gone: under way, and not seen lately.
        previews: participations of administrators, which count nowhere.
        votes: of those who completed and are not excluded.
        named: of these votes those on a reply that may name its model.
        voids: times that a turn was void, by the kind of cause, which names no model.
        minutes: median of those who completed; None of none.
    """

    total: Count
    cells: Mapping[tuple[str, str], Count]
    tasks: Mapping[str, Count]
    ends: Mapping[str, int]
    gone: int
    previews: int
    votes: int
    named: int
    voids: Mapping[str, int]
    minutes: float | None

    @property
    def pairs(self) -> list[str]:
        """Of `cells`."""
        return list(dict.fromkeys(pair for pair, _ in self.cells))


def progress(participants: Iterable[Participant], settings: StudySettings, tasks: Tasks, now: float) -> Progress:
    """Counts participants; `now` in seconds since 1970."""
    everybody = list(participants)
    own = [state for state in everybody if state.mode == settings.mode]
    types = [kind.id for kind in tasks.types]
    order = {frozenset(pair): ':'.join(pair) for pair in settings.compared}
    cells: dict[tuple[str, str], Count] = {
        (name, kind): collections.Counter() for name in order.values() for kind in types
    }
    of_task: dict[str, Count] = {task.id: collections.Counter() for kind in tasks.types for task in kind.tasks}
    total: Count = collections.Counter()
    for state in own:
        kind = standing(state, now, settings.gone_seconds)
        total[kind] += 1
        if state.main and state.document_type:  # of other pairs and tasks where the config was changed
            name = order.setdefault(frozenset(state.main.pair), ':'.join(state.main.pair))
            cells.setdefault((name, state.document_type), collections.Counter())[kind] += 1
        if state.prepared:
            of_task.setdefault(state.prepared.task, collections.Counter())[kind] += 1
    for name in order.values():
        for kind_id in types:
            cells.setdefault((name, kind_id), collections.Counter())
    done = completed(own, settings.mode)
    judged = [turn for state in done if state.main for turn in state.main.judged]
    times = [(state.seen_at - state.began_at) / 60 for state in done]
    return Progress(
        total=total,
        cells=cells,
        tasks=of_task,
        ends=collections.Counter(state.outcome for state in own if state.outcome),
        gone=sum(state.outcome is None and standing(state, now, settings.gone_seconds) == 'left' for state in own),
        previews=sum(state.mode == 'preview' for state in everybody),
        votes=len(judged),
        named=sum(bool(turn.replies and turn.replies.named) for turn in judged),
        voids=collections.Counter(
            kind or 'of no kind that was stored'
            for state in own
            for talk in (state.training, state.main)
            if talk
            for kind in talk.void_kinds
        ),
        minutes=statistics.median(times) if times else None,
    )


@dataclasses.dataclass(frozen=True)
class Needed:
    """Sizes that reach the planned power, each a `Size` or the reason why none does.

    Attributes:
        by_plan: with the clustering and ties that the plan assumes.
        by_votes: with those of the votes so far; None while they are too few.
        clustering: of the votes so far.
    """

    by_plan: Size | str
    by_votes: Size | str | None
    clustering: Clustering


def needed(participants: Iterable[Participant], mode: Mode, plan: Plan) -> Needed:
    """The sizes for the planned effect, from votes of those who completed, blind."""
    done = votes(completed(participants, mode), mode, pairs=plan.pairs)
    clustering = blind_clustering(
        [vote.preference for vote in done], [vote.participant for vote in done], [vote.pair for vote in done]
    )

    def size(of: Clustering) -> Size | str:
        try:
            return planned_size(plan.settings, len(plan.pairs), of)
        except UnreachableError as error:
            return str(error)

    by_votes = size(clustering) if clustering.is_known else None
    return Needed(size(assumed(plan.settings, plan.exchanges)), by_votes, clustering)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A turn as it is shown to administrators.

    Attributes:
        replies: A and B as HTML; both are withheld where one may name its model, as which of them does tells it, too.
        choice, kept: 'A', 'B' or 'tie'.
        seconds: from the replies' being shown to the vote.
    """

    number: int
    status: str
    message: str
    message_conduct: Conduct
    voids: int
    replies: tuple[Markup, Markup] | None
    cut: tuple[bool, bool]
    choice: str
    kept: str
    reason: str
    reason_conduct: Conduct
    seconds: float | None


def exchanges(talk: Talk | None) -> list[Exchange]:
    """The turns of a session."""
    return [_exchange(number, turn) for number, turn in enumerate(talk.turns, 1)] if talk else []


def _exchange(number: int, turn: Turn) -> Exchange:
    replies, vote = turn.replies, turn.preferred

    def shown(replies: Replied) -> tuple[Markup, Markup]:
        return (WITHHELD, WITHHELD) if replies.named else (to_html(replies.left_text), to_html(replies.right_text))

    return Exchange(
        number=number,
        status=turn.status,
        message=turn.message,
        message_conduct=turn.conduct,
        voids=turn.voids,
        replies=shown(replies) if replies else None,
        cut=(replies.left_cut, replies.right_cut) if replies else (False, False),
        choice=NAMES[vote.choice] if vote else '',
        kept=NAMES[vote.kept] if vote else '',
        reason=vote.reason if vote else '',
        reason_conduct=vote.conduct if vote else Conduct(),
        seconds=turn.judged_at - turn.shown_at if turn.judged_at and turn.shown_at else None,
    )
