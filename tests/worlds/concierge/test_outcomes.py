"""Outcomes of conversations: cases by hand, exploits that do not pay, and counts of user messages."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.worlds.concierge import language, scripted
from simrl.worlds.concierge.language import ATTRIBUTES, Intent
from simrl.worlds.concierge.outcomes import Outcome, UserStatistics, outcome_of, user_statistics, vote
from simrl.worlds.concierge.people import STEREOTYPES, World, person, stereotyped

INTENT = Intent.from_text('food thai price cheap area any time dinner')
RIGHT = 'try cheap thai near park for dinner'
HALF = 'try cheap sushi'


def talk(*texts: str) -> list[tuple[str, str]]:
    return [(('user', 'assistant')[number % 2], text) for number, text in enumerate(texts)]


@pytest.mark.parametrize(
    ('texts', 'ended', 'outcome'),
    [
        (('hi', RIGHT, 'ok thanks'), True, Outcome(0.97, 1.0, False, True, 1, 'propose')),
        (('hi', RIGHT), False, Outcome(0.97, 1.0, False, False, 1, 'propose')),
        (('hi', RIGHT, 'ok thanks'), False, Outcome(0.97, 1.0, False, False, 1, 'propose')),
        (('hi', RIGHT, 'forget it'), True, Outcome(-0.03, 1.0, True, False, 1, 'propose')),
        (('hi', RIGHT, ''), True, Outcome(-0.03, 1.0, True, False, 1, 'propose')),
        (('hi', RIGHT, 'no', HALF, 'ok thanks'), True, Outcome(1 / 3 - 0.06, 1 / 3, False, True, 2, 'propose')),
        (('hi', HALF, 'no', RIGHT, 'ok thanks'), True, Outcome(0.94, 1.0, False, True, 2, 'propose')),
        (('hi', RIGHT, 'um', 'which food?'), False, Outcome(0.94, 1.0, False, False, 2, 'propose')),
        (('hi', 'which food?', 'thai', RIGHT), False, Outcome(0.94, 1.0, False, False, 2, 'ask')),
        (('hi', 'what would you like?'), False, Outcome(-0.03, 0.0, False, False, 1, 'open')),
        (('hi', '\x00'), False, Outcome(-0.03, 0.0, False, False, 1, 'chatter')),
        (('hi', 'cheap thai near park for dinner'), False, Outcome(-0.03, 0.0, False, False, 1, 'chatter')),
        (('hi', 'try budget satay for supper'), False, Outcome(0.97, 1.0, False, False, 1, 'propose')),
        (('hi',), False, Outcome(0.0, 0.0, False, False, 0, 'none')),
        (('forget it',), True, Outcome(0.0, 0.0, True, False, 0, 'none')),
        (('ok thanks',), True, Outcome(0.0, 0.0, False, True, 0, 'none')),
    ],
)
def test_cases(texts, ended, outcome):
    found = outcome_of(INTENT, talk(*texts), ended)
    assert found.satisfaction == pytest.approx(outcome.satisfaction)
    assert found.share_met == pytest.approx(outcome.share_met)
    assert dataclasses.astuple(found)[2:] == dataclasses.astuple(outcome)[2:]


VALUES = st.tuples(*(st.sampled_from((*attribute.values, language.ANY)) for attribute in ATTRIBUTES)).filter(
    lambda values: set(values) != {language.ANY}
)


@given(VALUES)
def test_naming_every_value_wins_nothing(values):
    everything = ' '.join(value for attribute in ATTRIBUTES for value in attribute.values)
    assert outcome_of(Intent(values), talk('hi', f'try {everything}'), False).share_met == 0
    synonyms = ' '.join(synonym for attribute in ATTRIBUTES for synonym in attribute.synonyms)
    assert outcome_of(Intent(values), talk('hi', f'try {synonyms}'), False).share_met == 0


@given(VALUES)
def test_guesses_for_what_does_not_matter_are_free(values):
    met = [value if value != language.ANY else a.values[-1] for a, value in zip(ATTRIBUTES, values, strict=True)]
    assert outcome_of(Intent(values), talk('hi', language.proposal('try', met)), False).share_met == 1


def test_a_share_is_of_what_matters():
    for met in itertools.product((False, True), repeat=3):
        named = [value for value, right in zip(('thai', 'cheap', 'dinner'), met, strict=True) if right]
        assert outcome_of(INTENT, talk('hi', f'try {" ".join(named)}'), False).share_met == pytest.approx(sum(met) / 3)


def test_votes():
    assert vote(1.0, 0.75) == pytest.approx(0.9)
    assert vote(0.75, 1.0) == pytest.approx(0.1)
    assert vote(0.5, 0.5) == 0.5
    assert vote(0.5, 0.47) == pytest.approx(0.57, abs=0.005)  # one turn of effort


@given(st.floats(-0.2, 1), st.floats(-0.2, 1))
def test_two_votes_share_one_choice(one, other):
    assert vote(one, other) + vote(other, one) == pytest.approx(1)
    assert (vote(one, other) > 0.5) <= (one > other)


def test_statistics_by_hand():
    thia = language.TYPOS['thai'][0]
    messages = talk(
        f'hi, {thia} and thai for dinner please',  # 7 words, 2 attributes
        'try sushi',
        'no not sushi, not cheap, lunch',  # denies the right price, wants the wrong time
        'which area?',
        'any area, any food, park',  # the area does not matter, so wanting a park is against the intent, as is any food
        RIGHT,
        'ok thanks',
    )
    assert user_statistics(INTENT, messages, True) == UserStatistics(
        messages=4,
        words=7 + 6 + 5 + 2,
        opening_attributes=2,
        values=7,
        mistyped=1,
        statements=9,
        against_intent=4,
        left=0,
        accepted=1,
    )
    assert user_statistics(INTENT, messages[:-1], False).accepted == 0
    assert user_statistics(INTENT, [*messages[:-1], ('user', 'forget it')], True).left == 1
    assert user_statistics(INTENT, [], False) == UserStatistics(0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_scripted_users_say_nothing_against_their_intents_and_end_as_they_say():
    users = [person(World(), 'dev', number) for number in range(200)]
    users += [stereotyped(World(), name, 'dev', number) for name in STEREOTYPES for number in range(40)]
    for number, user in enumerate(users):
        kind = tuple(scripted.KINDS)[number % len(scripted.KINDS)]
        found = scripted.scripted_conversation(user, kind, number, identity='x')
        messages = [(turn.role, turn.content) for turn in found.messages]
        statistics = user_statistics(user.intent, messages, found.end == 'natural')
        assert statistics.against_intent == 0
        assert statistics.left == (found.messages[-1].content == language.LEAVE)
        assert statistics.left + statistics.accepted == (found.end == 'natural')


@pytest.mark.parametrize('judged', [outcome_of, user_statistics])
@pytest.mark.parametrize(
    ('messages', 'ended', 'message'),
    [
        ([('system', 'x')], False, "message 0: expected role 'user' or 'assistant', found 'system'"),
        (talk('hi', RIGHT), True, "expected the user's message last, found 'assistant'"),
        ([], True, "expected the user's message last, found 'no message'"),
    ],
)
def test_transcripts_that_cannot_be(judged, messages, ended, message):
    with pytest.raises(ValueError, match=message):
        judged(INTENT, messages, ended)
