"""Planted cheaters are flagged, each by the screen that is meant for them, and plausible honest people by none."""

import collections
import dataclasses
import gzip
import json
import os
import pathlib

import pytest

from simrl.run.config import differences
from simrl.study import screens
from simrl.study.events import Conduct, Flagged, Preferred, Prepared, Replied, Stored, Wrote
from simrl.study.flags import MEANINGS, Flag, ScreenSettings
from simrl.study.overlap import covered, likeness, stems
from simrl.study.participant import Participant, Talk, Turn, apply, fold_all
from simrl.study.screens import SCREENS, all_flags, flags, names_of
from simrl.study.settings import PlanSettings, plan_of
from simrl.study.text_files import read_tasks
from simrl.study.texts import DocumentType, Task, Tasks
from tests.study import planted
from tests.study.studies import settings

DATA = os.environ.get('SIMRL_DATA')
TASKS = read_tasks()
TASK = TASKS.task('kitchen-lesson')
NOTES = (
    'My sister, who burns everything and has just moved out.',
    'Three winters of flat sourdough bread, until I bought a thermometer.',
    'Try again and be patient with themselves.',
)
MESSAGES = (
    'hi! id like a blog post about my sourdough bread, it took me three winters. can you ask me things first?',
    'my sister is the reader, she burns everything. my kitchen is too cold so the dough never rose',
    'A is nice but too cheerful, could it be a bit more dry and honest? and please no lists',
    'better. can you put in the thermometer, I bought it for 6 pounds and it changed everything',
    'ok now make the ending shorter, i want her to try again',
)
REPLIES = (
    (
        'What did your first loaves look like, and who laughed at them?',
        'Tell me about the bread and about your kitchen.',
    ),
    (
        'Dear sister, put the matches away. My kitchen was an icebox.',
        'Bread wants warmth, and my kitchen had none of it.',
    ),
    (
        'The dough sat there for three winters and sulked, and so did I.',
        'Nobody claps for a flat loaf. I ate it anyway.',
    ),
    ('Then came a thermometer for six pounds. It read fourteen degrees.', 'For six pounds I learned what was wrong.'),
    ('Try again, and put the bowl somewhere warm.', 'So try once more. The oven light is enough.'),
)
REASONS = (
    'it asked better questions',
    'B sounds more like me, A is a bit much',
    'both fine',
    'has the number in it, which is funny',
    'short and warm',
)
CHOICES = ('left', 'right', 'tie', 'left', 'right')
FINAL = (
    'For three winters I baked bread that could have held a door open. My sister laughed, and she burns water. '
    'Then I bought a thermometer for six pounds and found that my kitchen had fourteen degrees, in which no dough '
    'wants to rise. Now the bowl stands beside the oven light, and the loaf is as round as a cat. So try again.'
)


@dataclasses.dataclass(frozen=True)
class Person:
    """A participant; by default an honest one who takes a minute for a message and half of one for a vote."""

    id: str = 'p'
    messages: tuple[str, ...] = MESSAGES
    replies: tuple[tuple[str, str], ...] = REPLIES
    reasons: tuple[str, ...] = REASONS
    choices: tuple[str, ...] = CHOICES
    practice: str = 'right'
    pasted: tuple[int, ...] = (0, 0, 0, 0, 0)
    writing_seconds: float = 60.0
    vote_seconds: float = 30.0
    final: str | None = FINAL
    final_pasted: int = 0
    attentive: bool = True
    other_sessions: int = 0
    flagged: tuple[Flagged, ...] = ()
    task: str = TASK.id
    notes: tuple[str, ...] = NOTES

    def made(self) -> Participant:
        """The participant, without the events before."""
        at, turns = 1000.0, []
        for message, replies, reason, choice, pasted in zip(
            self.messages, self.replies, self.reasons, self.choices, self.pasted, strict=True
        ):
            asked = at + self.writing_seconds
            at = asked + 5 + self.vote_seconds
            shown = Replied('one', 'two', *replies, 2.0, 3.0)
            vote = Preferred(choice, 'right' if choice == 'right' else 'left', reason)  # type: ignore[arg-type]
            turns.append(
                Turn(
                    message, Conduct(pasted, len(message), 50.0), asked, 'judged', 0, False, shown, asked + 5, vote, at
                )
            )
        practice = dataclasses.replace(turns[0], preferred=Preferred(self.practice, self.practice, 'good'))  # type: ignore[arg-type]
        wrote = (
            None if self.final is None else Wrote(self.final, self.attentive, Conduct(self.final_pasted, 300, 400.0))
        )
        return Participant(
            self.id,
            'live',
            'over' if wrote else 'final',
            30,
            0.0,
            at,
            outcome='completed' if wrote else None,
            document_type='blog_post',
            prepared=Prepared(self.task, self.notes),
            training=Talk(('one', 'two'), 900.0, (practice,)),
            main=Talk(('one', 'two'), 1000.0, tuple(turns)),
            wrote=wrote,
            other_sessions=self.other_sessions,
            flagged=self.flagged,
        )


def names(person: Person, settings: ScreenSettings = ScreenSettings()) -> set[str]:
    return {flag.flag for flag in flags(person.made(), TASKS, settings)}


HONEST = {
    'as planned': Person(),
    'quick and brief': Person(
        messages=('a blog post about sourdough bread please', 'shorter', 'more about my sister', 'good', 'no lists'),
        reasons=('clearer', 'shorter', 'clearer', 'more like me', 'same'),
        writing_seconds=8.0,
        vote_seconds=5.0,
    ),
    'quotes a reply by pasting it': Person(
        messages=(*MESSAGES[:4], f'please change this: {" ".join(REPLIES[3])} it is too long, my sister is impatient'),
        pasted=(0, 0, 0, 0, 100),
    ),
    'pastes the task once': Person(messages=(f'{TASK.title}. {TASK.brief}', *MESSAGES[1:]), pasted=(230, 0, 0, 0, 0)),
    'ends with a reply': Person(final=' '.join(text for pair in REPLIES for text in pair), final_pasted=500),
    'pastes a name': Person(pasted=(20, 0, 5, 0, 0)),
    'likes one side but once': Person(choices=('left', 'left', 'left', 'left', 'tie'), practice='left'),
    'skims long replies': Person(replies=tuple((f'{a} {"bread " * 400}', b) for a, b in REPLIES), vote_seconds=20.0),
    'is under way': Person(final=None),
    'says thanks': Person(messages=(*MESSAGES[:4], 'Thank you!')),
}


@pytest.mark.parametrize('kind', HONEST)
def test_honest_people_are_not_flagged(kind):
    assert not flags(HONEST[kind].made(), TASKS)


AI_MESSAGE = (
    'Certainly! Here is a revised version of the passage about bread, which delves into the tapestry of a warm kitchen '
    'and of patience. Let me know if you would like any further changes to the tone or to the length of the text.'
)
ELSEWHERE = (
    'tell me who won the football on saturday and what the odds are for next week',
    'and which horse should i bet on at the races, with the money of my uncle',
    'list the prices of electric scooters in manchester',
    'who is the richest singer in the charts, and how tall',
    'when does the train to leeds leave, i have no timetable',
)
CHEATERS = {
    'attention': Person(attentive=False),
    'fast': Person(vote_seconds=2.0),
    'fast_writing': Person(
        messages=(*MESSAGES[:4], 'so my sister ' + ' '.join(f'kneads the dough on day {n}' for n in range(20))),
        writing_seconds=7.0,
    ),
    'pasted': Person(pasted=tuple(map(len, MESSAGES))),
    'assistant_phrases': Person(messages=(AI_MESSAGE, *MESSAGES[1:])),
    'off_task': Person(messages=ELSEWHERE),
    'copied_task': Person(messages=tuple(f'{TASK.brief} {word}' for word in ('please', 'now', 'again', 'more', 'ok'))),
    'repeated_messages': Person(
        messages=(MESSAGES[0], *['make it better please'] * 2, *['Make it better, please!'] * 2)
    ),
    'repeated_reasons': Person(reasons=('It is better.', 'it is better', 'It is better!', 'other', 'it is better')),
    'one_side': Person(choices=('left',) * 5, practice='left'),
    'little_effort': Person(messages=('bread', 'go on', 'ok then', 'nice', 'end it')),
    'other_session': Person(other_sessions=2),
}


@pytest.mark.parametrize('flag', CHEATERS)
def test_a_cheater_is_flagged_by_the_screen_for_it(flag):
    found = {given.flag: given.reason for given in flags(CHEATERS[flag].made(), TASKS)}
    assert flag in found
    assert set(found) <= {flag, 'repeated_messages'}
    assert found[flag]
    assert '\n' not in found[flag]


def test_each_screen_has_a_meaning_and_a_cheater():
    assert set(SCREENS) == set(CHEATERS)
    assert set(SCREENS) | {'like_another', 'judge_borderline', 'judge_low_quality'} == set(MEANINGS)
    with pytest.raises(ValueError, match=r"PlanSettings.excluded_flags: expected names of .*, found \['fats'\]"):
        PlanSettings(excluded_flags=('fast', 'fats'))


@pytest.mark.parametrize(
    ('person', 'flag', 'changed'),
    [
        ('fast', 'fast', {'vote_seconds': 1.0, 'read_words': 1e6}),
        ('fast', 'fast', {'max_vote_seconds': 1.0}),
        ('fast', 'fast', {'fast_share': 1.1}),
        ('fast_writing', 'fast_writing', {'written_words': 2000.0}),
        ('fast_writing', 'fast_writing', {'written_least': 500}),
        ('pasted', 'pasted', {'pasted_share': 1.1}),
        ('pasted', 'pasted', {'pasted_chars': 10_000}),
        ('assistant_phrases', 'assistant_phrases', {'phrases': 9, 'marks': 9}),
        ('off_task', 'off_task', {'shared_stems': 0}),
        ('off_task', 'off_task', {'shared_share': 0.0}),
        ('off_task', 'off_task', {'judged_stems': 500}),
        ('copied_task', 'copied_task', {'copied_share': 1.1}),
        ('copied_task', 'copied_task', {'copied_messages': 6}),
        ('repeated_messages', 'repeated_messages', {'alike': 1.1}),
        ('repeated_messages', 'repeated_messages', {'repeated_share': 0.9}),
        ('repeated_reasons', 'repeated_reasons', {'reasons_alike': 1.1}),
        ('repeated_reasons', 'repeated_reasons', {'reasons_share': 0.9}),
        ('repeated_reasons', 'repeated_reasons', {'least_reasons': 6}),
        ('one_side', 'one_side', {'one_side_votes': 7}),
        ('little_effort', 'little_effort', {'effort_words': 1.0}),
    ],
)
def test_each_threshold_matters(person, flag, changed):
    assert flag in names(CHEATERS[person])
    assert flag not in names(CHEATERS[person], ScreenSettings(**changed))


def test_a_pasted_text_of_an_ai_is_flagged_by_several_screens():
    assert {'pasted', 'assistant_phrases'} <= names(
        Person(messages=(AI_MESSAGE,) * 5, pasted=(len(AI_MESSAGE),) * 5, writing_seconds=4.0)
    )
    assert names(Person(final=AI_MESSAGE * 2, final_pasted=2 * len(AI_MESSAGE))) == {'pasted'}
    assert names(Person(final=' '.join(ELSEWHERE))) == {'off_task'}


def test_texts_of_another_participant_are_found_and_common_sources_are_not():
    twin = Person(id='q', messages=('We write about bread, fine?', *MESSAGES[1:]), final=FINAL.replace('cat', 'dog'))
    other = Person(
        id='r',
        messages=(f'{TASK.title} {TASK.brief}', *['My story is of soup.'] * 4),
        final=' '.join(text for pair in REPLIES for text in pair),  # shown to all
    )
    again = Person(id='s', messages=(f'{TASK.title} {TASK.brief}', *['Mine is of plum jam.'] * 4), final=other.final)
    everyone = [person.made() for person in (Person(), twin, other, again)]
    found = names_of(all_flags(everyone, TASKS))
    assert found['p'] == found['q'] == ('like_another',)
    assert 'like_another' not in {*found['r'], *found['s']}
    assert 'q' in all_flags(everyone, TASKS)['p'][0].reason
    assert not all_flags(everyone[:2], TASKS, ScreenSettings(others_share=1.1))
    assert not all_flags(everyone[:2], TASKS, ScreenSettings(others_words=10_000))


def test_flags_of_a_judge_are_among_them_and_nobody_is_flagged_before_the_conversation():
    given = Flagged('judge_low_quality', 'sends nonsense')
    assert flags(Person(flagged=(given,)).made(), TASKS) == (Flag('judge_low_quality', 'sends nonsense'),)
    early = Participant('p', 'live', 'check', 3, 0.0, 1.0, flagged=(given,))
    assert flags(early, TASKS) == (Flag('judge_low_quality', 'sends nonsense'),)
    with pytest.raises(KeyError):
        flags(Person(task='of another study').made(), TASKS)


def test_a_void_turn_is_no_vote_and_no_replies():
    made = Person().made()
    assert made.main is not None
    void = Turn('And the crust?', Conduct(), made.seen_at + 50, 'void', 1)
    waiting = dataclasses.replace(made, main=dataclasses.replace(made.main, turns=(*made.main.turns, void)))
    assert not flags(waiting, TASKS)


def test_cheaters_of_a_made_up_study_are_found():
    """Of people whose words are drawn at random, through events and their fold."""
    study = planted.Planted(people=80, cheaters=dict.fromkeys(planted.CHEATS, 0.08))
    events, cheaters = planted.planted_study(study, seed=3)
    tasks = Tasks(
        tuple(
            DocumentType(kind, f'a {kind}', ('Why?',), tuple(Task(id, id, brief) for id, brief in own.items()))
            for kind, own in planted.TASKS.items()
        )
    )
    people = fold_all(events)
    found = names_of(all_flags(people.values(), tasks))
    meant = {
        'inattentive': 'attention',
        'fast': 'fast',
        'pasted': 'pasted',
        'ai': 'assistant_phrases',
        'repeats': 'repeated_messages',
        'off_task': 'repeated_messages',  # the same message again, with a word of the task
        'left': 'one_side',
    }
    assert set(cheaters.values()) == set(meant)
    assert all(meant[kind] in found[id] for id, kind in cheaters.items())
    honest = collections.Counter(name for id in people.keys() - cheaters.keys() for name in found.get(id, ()))
    assert set(honest) <= {'one_side'}
    assert honest['one_side'] <= 0.1 * (len(people) - len(cheaters))


def test_measures_of_words():
    assert covered('We take the big red bus to town', ['they saw THE BIG, red bus today']) == 4 / 8
    assert covered('', ['x']) == covered('one two three', ['one two three']) == 0  # too short for a passage
    assert likeness('Make it better!', 'make it  better') == 1
    assert likeness('', 'a') == 0
    assert 0.5 < likeness('make it shorter please', 'make it a bit shorter please') < 0.9
    assert stems(['Writing a story about BAKERIES', 'the baker']) == {'baker'}


@pytest.mark.skipif(not DATA, reason='SIMRL_DATA is not set')
def test_real_people_are_seldom_flagged_and_found_with_the_task_of_somebody_else():
    """51 people who wrote documents with an assistant; the rates are those that `screens` states."""
    assert DATA
    with gzip.open(pathlib.Path(DATA) / 'simulatorarena' / 'conversations.jsonl.gz', 'rt', encoding='utf-8') as file:
        rows = [row for row in map(json.loads, file) if row['source'].endswith('doc')]
    tasks = Tasks((DocumentType('d', 'a d', ('?',), tuple(Task(row['id'], '-', row['intent']) for row in rows)),))

    def person(of, task, speaker='user'):
        own = [message['content'] for message in of['messages'] if message['role'] == speaker]
        other = [message['content'] for message in of['messages'] if message['role'] != speaker]
        size = len(own)
        return Person(
            of['id'],
            tuple(own),
            tuple((text, text) for text in [*other, *[''] * size][:size]),
            tuple(f'{n} {text[:20]}' for n, text in enumerate(own)),
            tuple('left' if n % 2 else 'right' for n in range(size)),
            pasted=(0,) * size,
            writing_seconds=600.0,
            final=None,
            task=task['id'],
            notes=tuple(said['answer'] or '-' for said in task['background'][:3]),
        ).made()

    assert len(rows) == 51
    assert not all_flags([person(row, row) for row in rows], tasks)
    swapped = [
        person(row, other)
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
        if row['intent'] != other['intent']
    ]
    caught = sum('off_task' in {flag.flag for flag in flags(one, tasks)} for one in swapped)
    assert caught >= 0.85 * len(swapped) > 40
    assistants = [flags(person(row, row, 'assistant'), tasks) for row in rows[::2]]
    assert sum('assistant_phrases' in {flag.flag for flag in given} for given in assistants) >= 0.75 * len(assistants)


def test_thresholds_are_part_of_the_plan():
    plain, changed = (settings(screens=ScreenSettings(phrases=n)) for n in (1, 2))
    assert differences(plan_of(plain), plan_of(changed)) == ['screens.phrases: 1 -> 2']


def test_only_participants_to_whom_something_happened_are_screened_again(monkeypatch):
    tasks = {kind.id: {task.id: task.brief for task in kind.tasks} for kind in TASKS.types}
    study = planted.Planted(people=12, cheaters={'pasted': 0.3}, tasks=tasks)
    people = fold_all(planted.planted_study(study, 1)[0])
    known = {}
    first = all_flags(people.values(), TASKS, known=known)
    assert first == all_flags(people.values(), TASKS)
    assert first
    asked, own = [], screens.flags
    monkeypatch.setattr(screens, 'flags', lambda one, *more: [asked.append(one.id), own(one, *more)][1])
    assert all_flags(people.values(), TASKS, known=known) == first
    assert asked == []
    id = next(iter(people))
    flagged = Stored(9_999, id, people[id].version + 1, 0.0, Flagged('judge_low_quality', 'why'))
    people[id] = apply(people[id], flagged)
    again = all_flags(people.values(), TASKS, known=known)
    assert asked == [id]
    assert 'judge_low_quality' in {flag.flag for flag in again[id]}
