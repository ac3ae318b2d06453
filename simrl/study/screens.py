"""Screens of quality: a participant -> flags with reasons. Nobody is excluded by one: the analysis plan says who is.

Each screen is a pure function of a participant and of thresholds, which are stated with their reasons in
`ScreenSettings`. A screen may be wrong about a person; several that agree seldom are. Only the main session is looked
at, but for the side of votes, for which the practice round counts, too. Texts are taken for English: in another
language `off_task` finds less and `assistant_phrases` nothing; without spaces no count of words means anything.

Counted on real conversations. Of 51 people who were paid to write a document with an assistant (SimulatorArena), with
their first three answers beforehand as notes, no screen of texts flags one. Of their 322 pairings with the task of
somebody else `off_task` finds 91%; of their assistants, taken as participants, `assistant_phrases` finds 84%. Of 1,500
people in conversations of everyday use with 4 to 20 messages it flags 0.8%, `repeated_messages` 1.7% ("continue"),
`little_effort` 0.6%, and `like_another` 2.0% (published prompts). Times and sides cannot be counted there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence

from simrl.study.flags import JUDGED_OK, Flag, ScreenSettings
from simrl.study.others import Others, Run, others_of, runs_of, runs_of_tasks
from simrl.study.overlap import covered, likeness, stems, words
from simrl.study.participant import Participant, Talk, Turn
from simrl.study.phrases import MARKS, PHRASES
from simrl.study.texts import Task, Tasks, number_of


@dataclasses.dataclass(frozen=True)
class Seen:
    """All that the screens look at.

    Attributes:
        turns: of the main session, judged or not.
        judged: those with a vote.
        brief: texts of the task.
    """

    participant: Participant
    task: Task
    talk: Talk

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.talk.turns

    @property
    def judged(self) -> tuple[Turn, ...]:
        return self.talk.judged

    @property
    def messages(self) -> list[str]:
        return [turn.message for turn in self.turns]

    @property
    def notes(self) -> tuple[str, ...]:
        return self.participant.prepared.notes if self.participant.prepared else ()

    @property
    def brief(self) -> list[str]:
        return [self.task.title, self.task.brief]

    @property
    def final_text(self) -> str:
        return self.participant.wrote.text if self.participant.wrote else ''

    def quotable(self, before: int) -> list[str]:
        """All that a participant may quote in a turn, of a number from 0: what they saw or typed till then."""
        earlier = self.turns[:before]
        typed = [turn.message for turn in earlier if not turn.conduct.pasted]
        return [*self.brief, *self.notes, *typed, *(text for turn in earlier for text in turn.shown)]


def flags(participant: Participant, tasks: Tasks, settings: ScreenSettings = ScreenSettings()) -> tuple[Flag, ...]:
    """The flags of a participant, with those that a judge gave; none before their main session.

    Texts are compared with nobody else's: see `all_flags`.

    Raises:
        KeyError: the participant's task is not among the tasks: they are another study's.
    """
    found = [Flag(given.flag, given.reason) for given in participant.flagged if given.flag != JUDGED_OK]
    if participant.main is None or participant.prepared is None:
        return tuple(found)
    seen = Seen(participant, tasks.task(participant.prepared.task), participant.main)
    for flag, screen in SCREENS.items():
        if reason := screen(seen, settings):
            found.append(Flag(flag, reason))
    return tuple(found)


def _like_another(id: str, others: Others, settings: ScreenSettings) -> tuple[Flag, ...]:
    reason = others.like(id, settings.others_share)
    return (Flag('like_another', reason),) if reason else ()


@dataclasses.dataclass(frozen=True)
class Own:
    """All that screens find in a participant alone, until something happens to them.

    Attributes:
        version: of the participant.
        texts: runs of words, for `Others`.
    """

    version: int
    flags: tuple[Flag, ...]
    texts: tuple[frozenset[Run], ...]


def all_flags(
    participants: Iterable[Participant],
    tasks: Tasks,
    settings: ScreenSettings = ScreenSettings(),
    known: MutableMapping[str, Own] | None = None,
) -> dict[str, tuple[Flag, ...]]:
    """The flags of each participant of a study, by id; of one without flags there is no entry.

    Args:
        participants: of one mode.
        known: by id, of an earlier call with the same tasks and settings; it is brought up to date.

    Raises:
        KeyError: as of `flags`.
    """
    known = {} if known is None else known
    ids, of_tasks = [], runs_of_tasks(tasks)
    for one in participants:
        ids.append(one.id)
        if one.id not in known or known[one.id].version != one.version:
            texts = runs_of(one, of_tasks, settings.others_words)
            known[one.id] = Own(one.version, flags(one, tasks, settings), texts)
    others = others_of({id: known[id].texts for id in ids})
    found = {id: known[id].flags + _like_another(id, others, settings) for id in ids}
    return {id: given for id, given in found.items() if given}


def names_of(found: Mapping[str, Sequence[Flag]]) -> dict[str, tuple[str, ...]]:
    """The names of flags by participant, each once, as `votes.votes` takes them."""
    return {id: tuple(dict.fromkeys(flag.flag for flag in given)) for id, given in found.items()}


def attention(seen: Seen, settings: ScreenSettings) -> str | None:
    wrote = seen.participant.wrote
    return None if wrote is None or wrote.attentive else 'another option was chosen than the text asked for'


def fast_votes(seen: Seen, settings: ScreenSettings) -> str | None:
    """Compares the time of each vote with that of skimming both replies."""
    fast = []
    for turn in seen.judged:
        seconds = _between(turn.shown_at, turn.judged_at)
        read = 60 * sum(len(words(text)) for text in turn.shown) / settings.read_words
        if seconds < min(max(read, settings.vote_seconds), settings.max_vote_seconds):
            fast.append(seconds)
    if not fast or len(fast) < settings.fast_share * len(seen.judged):
        return None
    quickest = f'the quickest after {min(fast):.1f} s'
    return f'{len(fast)} of {len(seen.judged)} votes came before both replies can have been skimmed, {quickest}'


def fast_writing(seen: Seen, settings: ScreenSettings) -> str | None:
    """Compares the length of each message with the time since the vote before it, by the server's clock."""
    rates = []
    since = seen.talk.assigned_at
    for number, turn in enumerate(seen.turns):
        count = len(words(turn.message))
        minutes = _between(since, turn.asked_at) / 60
        if count >= settings.written_least and count > settings.written_words * minutes:
            own = count * (1 - covered(turn.message, seen.quotable(number)))
            if own > settings.written_words * minutes:
                rates.append(own / max(minutes, 1 / 60))
        since = turn.judged_at if turn.judged_at is not None else turn.asked_at
    if not rates:
        return None
    return f'{len(rates)} of {len(seen.turns)} messages were written at up to {max(rates):.0f} words a minute'


def pasted(seen: Seen, settings: ScreenSettings) -> str | None:
    """Adds up what was pasted and is no quotation: of the messages, and of the final text."""
    foreign = [
        _foreign(turn.message, turn.conduct.pasted, seen.quotable(number)) for number, turn in enumerate(seen.turns)
    ]
    parts = [('messages', sum(foreign), sum(map(len, seen.messages)))]
    if seen.participant.wrote:
        final = seen.participant.wrote
        sources = seen.quotable(len(seen.turns))
        parts.append(('the final text', _foreign(final.text, final.conduct.pasted, sources), len(final.text)))
    told = [
        f'{chars:.0f} of {size} characters of {name}'
        for name, chars, size in parts
        if chars >= max(settings.pasted_chars, settings.pasted_share * size)
    ]
    return f'{" and ".join(told)} were pasted and are no quotation' if told else None


def assistant_phrases(seen: Seen, settings: ScreenSettings) -> str | None:
    """Looks in messages for what assistants say and people seldom write; quotations of earlier replies do not count."""
    phrases: set[str] = set()
    marks: set[str] = set()
    for number, turn in enumerate(seen.turns):
        shown = ' '.join(seen.quotable(number)).lower()
        found = [{match[0].lower() for match in pattern.finditer(turn.message)} for pattern in (PHRASES, MARKS)]
        phrases |= {text for text in found[0] if text not in shown}
        marks |= {text for text in found[1] if text not in shown}
    if len(phrases) < settings.phrases and len(marks) < settings.marks:
        return None
    return f'messages have {", ".join(map(repr, sorted(phrases | marks)[:6]))}'


def off_task(seen: Seen, settings: ScreenSettings) -> str | None:
    """Compares the words of the messages with those of the task and notes; those of the final text with all else."""
    about = [*seen.brief, *seen.notes]
    parts = [('messages', stems(seen.messages), stems(about))]
    if seen.final_text:
        parts.append(('the final text', stems([seen.final_text]), stems([*about, *seen.quotable(len(seen.turns))])))
    for name, own, subject in parts:
        shared = len(own & subject)
        few = shared < settings.shared_stems and shared < settings.shared_share * len(own)
        if len(own) >= settings.judged_stems and few:
            return f'of {len(own)} words of {name} {shared} are of the task, the notes or the conversation'
    return None


def copied_task(seen: Seen, settings: ScreenSettings) -> str | None:
    copied = sum(covered(message, seen.brief) >= settings.copied_share for message in seen.messages)
    if copied < settings.copied_messages:
        return None
    return f'{copied} of {len(seen.messages)} messages are passages of the task'


def repeated_messages(seen: Seen, settings: ScreenSettings) -> str | None:
    own = seen.messages
    again = sum(any(likeness(x, y) >= settings.alike for y in own[:number]) for number, x in enumerate(own))
    if len(own) < 3 or again < settings.repeated_share * (len(own) - 1):
        return None
    return f'{again} of {len(own)} messages are almost an earlier one'


def repeated_reasons(seen: Seen, settings: ScreenSettings) -> str | None:
    reasons = [turn.preferred.reason for turn in seen.judged if turn.preferred]
    most = max((sum(likeness(x, y) >= settings.reasons_alike for y in reasons) for x in reasons), default=0)
    if len(reasons) < settings.least_reasons or most < settings.reasons_share * len(reasons):
        return None
    return f'{most} of {len(reasons)} reasons are almost alike'


def one_side(seen: Seen, settings: ScreenSettings) -> str | None:
    """Counts votes for the left, the right and ties, with that of the practice round."""
    practice = seen.participant.training.judged if seen.participant.training else ()
    choices = [turn.preferred.choice for turn in (*practice, *seen.judged) if turn.preferred]
    if len(choices) < settings.one_side_votes or len(set(choices)) > 1:
        return None
    return f'all {len(choices)} votes were {"ties" if choices[0] == "tie" else f"for the {choices[0]}"}'


def little_effort(seen: Seen, settings: ScreenSettings) -> str | None:
    count = sum(len(words(message)) for message in seen.messages)
    if len(seen.judged) < 3 or count >= settings.effort_words * len(seen.messages):
        return None
    return f'{len(seen.messages)} messages have {count} words'


def other_session(seen: Seen, settings: ScreenSettings) -> str | None:
    times = seen.participant.other_sessions
    return f'entered {number_of(times, "time")} by another session id' if times else None


Screen = Callable[[Seen, ScreenSettings], str | None]
SCREENS: Mapping[str, Screen] = {
    'attention': attention,
    'fast': fast_votes,
    'fast_writing': fast_writing,
    'pasted': pasted,
    'assistant_phrases': assistant_phrases,
    'off_task': off_task,
    'copied_task': copied_task,
    'repeated_messages': repeated_messages,
    'repeated_reasons': repeated_reasons,
    'one_side': one_side,
    'little_effort': little_effort,
    'other_session': other_session,
}  # by flag; each says what it found, or None


def _between(start: float | None, end: float | None) -> float:
    assert start is not None
    assert end is not None
    return end - start


def _foreign(text: str, pasted_chars: int, sources: Sequence[str]) -> float:
    """Characters of a text that were pasted and are no quotation. A pasted passage may have been deleted again."""
    pasted = min(pasted_chars, len(text))
    return max(0.0, pasted - covered(text, sources) * len(text)) if pasted else 0.0
