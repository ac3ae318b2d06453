"""A participant -> all that their page may know: texts and numbers, and nothing of models.

Templates see a `View` alone, so that no name of a model, pair or time of a reply can get into a page.
"""

import dataclasses
import itertools
import urllib.parse
from typing import Literal

from markupsafe import Markup

from simrl.study.events import Mode
from simrl.study.participant import Outcome, Participant, Step, Turn
from simrl.study.render import to_html
from simrl.study.settings import CODES, StudySettings, TaskSettings
from simrl.study.steps import has_lost_models, may_conclude, may_retry
from simrl.study.texts import DocumentType, Task, Tasks

PARTS: tuple[Step, ...] = ('consent', 'instructions', 'check', 'task', 'training', 'conversation', 'final')


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A message, and what is shown of its replies.

    Attributes:
        replies: of A and B, once both are there and until the vote.
        kept: the reply that the conversation continues from, after the vote.
        may_retry: the message was answered by none, and may be sent again as it is.
        refused: by moderation.
    """

    message: str
    status: Literal['waiting', 'void', 'shown', 'judged']
    replies: tuple[Markup, Markup] | None
    kept: Markup | None
    may_retry: bool
    refused: bool


@dataclasses.dataclass(frozen=True)
class View:
    """All that a page shows of a participant.

    Attributes:
        document_type, task: None before they are known, and where the tasks' file no longer has them.
        notes: pairs of a question, as it was asked, and its answer.
        part: number of the step, from 1; 0 once all is over.
        parts: number of steps.
        tries_left: of the comprehension check, after a wrong one; None before.
        earlier: judged exchanges of the session that is shown.
        exchange: the last one, unless it is judged.
        number: of the exchange that the page asks for, from 1.
        version: of the page that forms are sent from.
        has_enough: exchanges for the final text.
        may_conclude: the final text may follow.
        is_full: no further message may follow, as the max number is reached or a model is gone.
        cut_short: the study ended for one who had agreed, as the config no longer has what they need.
        code: for the panel, of the outcome; empty where it has none. `way_back`: the panel's address with it.
    """

    step: Step
    version: int
    mode: Mode
    outcome: Outcome | None
    part: int
    parts: int
    tries_left: int | None
    document_type: DocumentType | None
    task: Task | None
    notes: tuple[tuple[str, str], ...]
    earlier: tuple[Exchange, ...]
    exchange: Exchange | None
    number: int
    has_enough: bool
    may_conclude: bool
    is_full: bool
    cut_short: bool
    code: str
    way_back: str

    @property
    def is_waiting(self) -> bool:
        return self.exchange is not None and self.exchange.status == 'waiting'


def view(participant: Participant, settings: StudySettings, tasks: Tasks) -> View:
    """The view of a participant."""
    step, prepared = participant.step, participant.prepared
    kind = next((own for own in tasks.types if own.id == participant.document_type), None)
    talk = participant.main if step == 'final' else participant.talk
    turns = [_exchange(turn, settings.task) for turn in talk.turns] if talk else []
    earlier = tuple(turn for turn in turns if turn.status == 'judged')
    last = turns[-1] if turns and turns[-1].status != 'judged' else None
    code = getattr(settings.panel, participant.outcome) if participant.outcome in CODES else ''
    return View(
        step=step,
        version=participant.page,
        mode=participant.mode,
        outcome=participant.outcome,
        part=PARTS.index(step) + 1 if step in PARTS else 0,
        parts=len(PARTS),
        tries_left=settings.task.check_tries - len(participant.checks) if participant.checks else None,
        document_type=kind,
        task=tasks.tasks.get(prepared.task) if prepared else None,
        notes=tuple(itertools.zip_longest(prepared.questions, prepared.notes, fillvalue='')) if prepared else (),
        earlier=earlier,
        exchange=last,
        number=len(earlier) + 1,
        has_enough=len(earlier) >= settings.task.exchanges,
        may_conclude=may_conclude(settings.task, participant),
        is_full=len(earlier) >= settings.task.max_exchanges or (talk is not None and has_lost_models(settings, talk)),
        cut_short=participant.outcome == 'closed' and not participant.was_turned_away,
        code=code,
        way_back=settings.panel.return_url.replace('{code}', urllib.parse.quote(code, safe='')) if code else '',
    )


def _exchange(turn: Turn, settings: TaskSettings) -> Exchange:
    shown = turn.replies if turn.status == 'shown' else None
    return Exchange(
        message=turn.message,
        status=turn.status,
        replies=(to_html(shown.left_text), to_html(shown.right_text)) if shown else None,
        kept=to_html(turn.kept) if turn.status == 'judged' else None,
        may_retry=may_retry(settings, turn),
        refused=turn.refused,
    )
