"""Events that an action of a participant comes to, by where they are and what they sent; or what is wrong with it.

Plain functions of a state; nothing is stored here. Events of one action are stored together.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from simrl.study import assignment
from simrl.study.events import (
    Asked,
    Checked,
    Choice,
    Concluded,
    Conduct,
    Event,
    Excluded,
    Flagged,
    Instructed,
    PairAssigned,
    PanelStatus,
    Preferred,
    Prepared,
    Retried,
    Session,
    TurnedAway,
    TypeAssigned,
    Voided,
    Wrote,
)
from simrl.study.participant import Participant, Step, Talk, Turn
from simrl.study.settings import StudySettings, TaskSettings
from simrl.study.texts import Tasks, Texts, fill

CHOICES: dict[str, Choice] = {'a': 'left', 'tie': 'tie', 'b': 'right'}
UNSTORABLE = re.compile('[\0\ud800-\udfff]')  # which no database takes as text


class OutOfDateError(RuntimeError):
    """An action of a page that is no longer the participant's: it was done already, or something came before it."""


class OtherStudyError(RuntimeError):
    """Somebody who entered by the link of another study of the panel than the first time."""


class BadInputError(ValueError):
    """An action that the participant must change. Its text is for them, of the study's texts.

    Attributes:
        field: of the form: `answer_0`, `task`, `note_0`, `message`, `choice`, `reason`, `text`, `attention`; answers
            and notes are numbered from 0.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Rules:
    """A study's settings, tasks and texts, and the key of its draws."""

    settings: StudySettings
    tasks: Tasks
    texts: Texts
    key: bytes = dataclasses.field(repr=False)

    def bad(self, field: str, problem: str, **numbers: int) -> BadInputError:
        return BadInputError(field, fill(getattr(self.texts.errors, problem), **numbers))

    def text(self, field: str, value: str, most: int, *, empty: str = 'empty') -> str:
        """A participant's text: its lines end as stored texts do, and it is neither empty nor longer than `most`.

        Args:
            empty: the error of the study's texts for an empty one.
        """
        value = UNSTORABLE.sub('\N{REPLACEMENT CHARACTER}', re.sub('\r\n?', '\n', value)).strip()
        if not value and empty:
            raise self.bad(field, empty)
        if len(value) > most:
            raise self.bad(field, 'too_long', limit=most, found=len(value))
        return value


def may_retry(task: TaskSettings, turn: Turn) -> bool:
    """True if the same message of a void turn may be asked again; another message always may."""
    return turn.status == 'void' and not turn.refused and turn.failed < task.tries


def may_conclude(task: TaskSettings, state: Participant) -> bool:
    """True if the participant has enough exchanges for the final text, and none is under way."""
    talk, turn = state.main, state.turn
    if state.step != 'conversation' or talk is None or turn is None:
        return False
    return turn.status in ('judged', 'void') and len(talk.judged) >= task.exchanges


def number_of_words(text: str) -> int:
    return len(text.split())


def instructed(state: Participant) -> list[Event]:
    expect(state, 'instructions')
    return [Instructed()]


def checked(
    rules: Rules, state: Participant, answers: Sequence[int], others: Iterable[Participant], now: float
) -> list[Event]:
    """A try of the comprehension check; once it is right, the type of document."""
    expect(state, 'check')
    questions = rules.texts.check
    for number, question in enumerate(questions):
        if number >= len(answers) or not 0 <= answers[number] < len(question.options):
            raise rules.bad(f'answer_{number}', 'unanswered')
    right = tuple(answers) == tuple(question.right for question in questions)
    last = len(state.checks) + 1 >= rules.settings.task.check_tries
    check = Checked(tuple(answers), right, last)
    if not right:
        return [check]
    types = [kind.id for kind in rules.tasks.types]
    return [check, TypeAssigned(assignment.document_type(rules.settings, rules.key, types, state.id, others, now))]


def prepared(rules: Rules, state: Participant, task: str, notes: Sequence[str], conduct: Conduct) -> list[Event]:
    """The task and the notes; the training exchange follows, with its pair."""
    expect(state, 'task')
    assert state.document_type is not None  # it is stored with the check
    kind = rules.tasks.type(state.document_type)
    if task not in [known.id for known in kind.tasks]:
        raise rules.bad('task', 'no_task')
    if any(notes[len(kind.questions) :]):
        raise OutOfDateError('the questions are others by now')
    given = [*notes, *[''] * len(kind.questions)][: len(kind.questions)]
    most = rules.settings.task.message_chars
    kept = tuple(rules.text(f'note_{n}', note, most, empty='unanswered') for n, note in enumerate(given))
    pair = assignment.training_pair(rules.settings, rules.key, state.id)
    return [Prepared(task, kept, conduct, kind.questions), PairAssigned('training', *pair)]


def asked(rules: Rules, state: Participant, message: str, conduct: Conduct) -> list[Event]:
    """A message, the first of the session, or after a vote, or in the place of one whose turn is void."""
    expect(state, 'training', 'conversation')
    if state.turn is not None and state.turn.status not in ('judged', 'void'):
        raise OutOfDateError('there is a message already')
    return [Asked(rules.text('message', message, rules.settings.task.message_chars), conduct)]


def retried(rules: Rules, state: Participant) -> list[Event]:
    if state.turn is None or not may_retry(rules.settings.task, state.turn):
        raise OutOfDateError('the message cannot be tried again')
    return [Retried()]


def preferred(
    rules: Rules,
    state: Participant,
    choice: str,
    reason: str,
    conduct: Conduct,
    others: Iterable[Participant],
    now: float,
) -> list[Event]:
    """A vote. After that of the training exchange, the pair of the main session; the last one ends the conversation."""
    talk, turn, settings = state.talk, state.turn, rules.settings
    if talk is None or turn is None or turn.status != 'shown':
        raise OutOfDateError('there are no replies to choose from')
    if choice not in CHOICES:
        raise rules.bad('choice', 'no_choice')
    least = settings.task.min_reason_chars
    reason = rules.text('reason', reason, settings.task.reason_chars, empty='')
    if len(reason) < least:
        raise rules.bad('reason', 'reason_too_short', limit=least, found=len(reason))
    session: Session = 'training' if state.step == 'training' else 'main'
    picked = CHOICES[choice]
    number = len(talk.turns) - 1
    kept = assignment.kept_of_tie(rules.key, state.id, session, number) if picked == 'tie' else picked
    vote = Preferred(picked, kept, reason, conduct)
    if session == 'training':
        return [vote, PairAssigned('main', *assignment.main_pair(settings, rules.key, state, others, now))]
    return [vote, Concluded()] if len(talk.judged) + 1 >= settings.task.max_exchanges else [vote]


def concluded(rules: Rules, state: Participant) -> list[Event]:
    if not may_conclude(rules.settings.task, state):
        raise OutOfDateError('the conversation cannot end here')
    return [Concluded()]


def wrote(rules: Rules, state: Participant, text: str, attention: int, conduct: Conduct) -> list[Event]:
    """The final text, with the answer to the attention item."""
    expect(state, 'final')
    task, item = rules.settings.task, rules.texts.attention
    text = rules.text('text', text, task.text_chars)
    if (words := number_of_words(text)) < task.min_words:
        raise rules.bad('text', 'too_few_words', limit=task.min_words, found=words)
    if not 0 <= attention < len(item.options):
        raise rules.bad('attention', 'unanswered')
    return [Wrote(text, attention == item.right, conduct)]


def noted(state: Participant, note: Flagged | Excluded | PanelStatus) -> list[Event]:
    """A note of an administrator or a screen; there is none on data that the participant had deleted."""
    if state.outcome == 'deleted':
        raise OutOfDateError('the data is deleted')
    return [note]


def is_stuck(rules: Rules, state: Participant) -> bool:
    """True if the next step needs what the config no longer has: their type of document, or a model that answers.

    Replies that are there can be voted on without their models.
    """
    if state.step == 'task':
        return state.document_type not in {kind.id for kind in rules.tasks.types}
    has_replies = state.turn is not None and state.turn.status == 'shown'
    return state.talk is not None and not has_replies and has_lost_models(rules.settings, state.talk)


def has_lost_models(settings: StudySettings, talk: Talk) -> bool:
    """True if the config no longer has a model of the session."""
    return not {*talk.pair} <= {*settings.models}


def sent_on(rules: Rules, state: Participant) -> list[Event]:
    """The end of what one who is stuck cannot continue; none of anybody else.

    Whoever has enough exchanges goes on to the final text, which needs no model, and so can complete the study and be
    paid. For others it is over.
    """
    if not is_stuck(rules, state):
        return []
    talk, turn = state.main, state.turn
    if talk is None or turn is None or len(talk.judged) < rules.settings.task.exchanges:
        return [TurnedAway()]
    gone = ', '.join(sorted({*talk.pair} - {*rules.settings.models}))
    unanswered = [Voided(f'the config no longer has {gone}', kind='model removed')] if turn.status == 'waiting' else []
    return [*unanswered, Concluded()]


def lacking(rules: Rules, states: Iterable[Participant]) -> str | None:
    """Lists what people whose participation is not over have begun with and the config no longer has; None: nothing."""
    known = {
        'models': set(rules.settings.models),
        'document types': {kind.id for kind in rules.tasks.types},
        'tasks': set(rules.tasks.tasks),
    }
    needed: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in known}
    for state in states:
        if state.step != 'over':
            needed['models'].update(state.talk.pair if state.talk else ())
            needed['document types'].update(filter(None, [state.document_type]))
            needed['tasks'].update([state.prepared.task] if state.prepared is not None else [])
    lines = [
        f'{name}: expected {value!r}, which {number} under way need, found {", ".join(sorted(known[name]))}'
        for name, found in needed.items()
        for value, number in sorted(found.items())
        if value not in known[name]
    ]
    return '; '.join(lines) or None


def expect(state: Participant, *steps: Step) -> None:
    if state.step not in steps:
        raise OutOfDateError(f'expected the step {" or ".join(steps)}, found {state.step}')
