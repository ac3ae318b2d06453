"""Events of a study become votes: each judged turn of a main session once, for the model that the reply was of."""

import collections

from simrl.study.events import Arrived, Deleted, Excluded, PairAssigned, Preferred, Replied, Stored
from simrl.study.participant import fold_all
from simrl.study.votes import votes
from tests.study.planted import Planted, planted_study

PAIRS = {('a', 'b'): 0.6, ('b', 'c'): 0.5}
BUSY = Planted(people=40, win_rates=PAIRS, leaves=0.05, declines=0.1, fails=0.1, voids=0.2, named=0.2, position=0.1)


def by_hand(events):
    """Wins of each model over each other, from the events alone."""
    wins, session, shown = collections.Counter(), {}, {}
    for stored in events:
        match stored.event:
            case PairAssigned(kind):
                session[stored.participant] = kind
            case Replied(left, right):
                shown[stored.participant] = left, right
            case Preferred(choice) if session[stored.participant] == 'main':
                left, right = shown[stored.participant]
                if choice == 'tie':
                    wins[left, right] += 0.5
                    wins[right, left] += 0.5
                else:
                    wins[(left, right) if choice == 'left' else (right, left)] += 1
    return wins


def test_wins_are_those_of_the_events():
    events, _ = planted_study(BUSY, seed=3)
    found = collections.Counter()
    for vote in votes(fold_all(events).values()):
        found[vote.pair] += vote.preference
        found[vote.pair[::-1]] += 1 - vote.preference
        assert {vote.left, vote.right} == set(vote.pair)
    assert found == by_hand(events)
    assert sum(found.values()) > 100


def test_a_vote_has_what_was_shown():
    events, _ = planted_study(BUSY, seed=4)
    replies = {
        text: (model, stored.participant)
        for stored in events
        if isinstance(stored.event, Replied)
        for model, text in (
            (stored.event.left, stored.event.left_text),
            (stored.event.right, stored.event.right_text),
        )
    }
    for vote in votes(fold_all(events).values(), flags={events[0].participant: ('fast',)}):
        for model in vote.pair:
            assert replies[vote.text_of(model)] == (model, vote.participant)
        assert vote.first_was_left == (vote.left_text == vote.text_of(vote.pair[0]))
        assert vote.flags == (('fast',) if vote.participant == events[0].participant else ())
        assert vote.asked_at < vote.shown_at < vote.judged_at
        assert bool(vote.named) == ('I am ' in vote.left_text)


def test_previews_and_what_was_deleted_are_no_votes():
    events, _ = planted_study(Planted(people=3), seed=5)
    one, two, three = dict.fromkeys(stored.participant for stored in events)
    preview = [
        Stored(s.number, s.participant, s.version, s.at, Arrived('preview')) if s.version == 1 else s
        for s in events
        if s.participant == one
    ]
    last = [s for s in events if s.participant == two][-1]
    gone = [next(s for s in events if s.participant == two), Stored(9999, two, last.version + 1, 0.0, Deleted())]
    excluded = [s for s in events if s.participant == three]
    excluded.append(Stored(10000, three, excluded[-1].version + 1, 0.0, Excluded(True, 'asked a friend')))
    people = fold_all([*preview, *gone, *excluded])
    assert {vote.participant for vote in votes(people.values())} == {three}
    assert {vote.excluded for vote in votes(people.values())} == {'asked a friend'}
    assert {vote.participant for vote in votes(people.values(), 'preview')} == {one}
    back = Stored(10001, three, excluded[-1].version + 1, 0.0, Excluded(False, 'it was no friend'))
    assert {vote.excluded for vote in votes(fold_all([*excluded, back]).values())} == {None}
