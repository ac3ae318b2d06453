"""The fold: events that may follow are folded, others refused; what is stored is what was said."""

import dataclasses
import itertools
import json
import random
import typing
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from simrl.study import events
from simrl.study.events import (
    Arrived,
    Asked,
    Checked,
    Concluded,
    Conduct,
    Consented,
    Deleted,
    Event,
    EventError,
    Excluded,
    Flagged,
    Instructed,
    PairAssigned,
    PanelStatus,
    PlanFrozen,
    Preferred,
    Prepared,
    Replied,
    Retried,
    Returned,
    Stored,
    TurnedAway,
    TypeAssigned,
    Voided,
    Withdrew,
    Wrote,
    from_row,
    to_row,
)
from simrl.study.participant import OutOfPlaceError, Participant, apply, fold, fold_all

STEPS = ('consent', 'instructions', 'check', 'task', 'training', 'conversation', 'final', 'over')
KINDS = typing.get_args(Event)
# Events by which any place of the study can be reached, and some that fit nowhere.
ALPHABET: tuple[Event, ...] = (
    Consented(True, 'p'),
    Instructed(),
    Checked((0,), True, False),
    TypeAssigned('story'),
    Prepared('story-1', ('n',)),
    PairAssigned('training', 'a', 'b'),
    PairAssigned('main', 'b', 'c'),
    Asked('one'),
    Asked('two'),
    Replied('a', 'b', 'A', 'B', 1.0, 2.0),
    Replied('c', 'b', 'C', 'B', 1.0, 2.0),
    Voided('down'),
    Retried(),
    Preferred('left', 'left', 'r'),
    Preferred('tie', 'right', 'r'),
    Concluded(),
    Wrote('text', True),
)
RARE: tuple[Event, ...] = (
    Arrived('live'),
    Consented(False, 'p'),
    PanelStatus('RETURNED'),
    Returned(False),
    Returned(True),
    Checked((1,), False, False),
    Checked((1,), False, True),
    Voided('refused', refused=True),
    Preferred('right', 'left', 'r'),
    Withdrew(''),
    TurnedAway(),
    Flagged('fast', 'r'),
    Excluded(True, 'r'),
    Excluded(False, 'r'),
    Deleted(),
    PlanFrozen({}, 'h', 'c'),
)
ENDS = (Withdrew(''), TurnedAway(), Deleted(), Consented(False, 'p'), Checked((1,), False, True))
WEIGHTS = [*[8.0] * len(ALPHABET), *[0.1 if event in ENDS else 1.0 for event in RARE]]
# Long ones, most of whose events are refused: the others lead to the end, or to one of the early ends.
SEQUENCES = st.integers(0, 2**32).map(lambda seed: random.Random(seed).choices(ALPHABET + RARE, WEIGHTS, k=300))

TEXT = st.text(max_size=5)
VALUES = {
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: TEXT,
    dict[str, Any]: st.dictionaries(TEXT, st.integers() | TEXT | st.lists(TEXT, max_size=2), max_size=2),
}


def any_event(kind: type[Event]) -> st.SearchStrategy[Event]:
    """Events of a kind with all values that their types allow."""
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: VALUES[hint] for name, hint in hints.items() if hint in VALUES})


def stored(*found: Event) -> list[Stored]:
    return [Stored(n, 'p1', n, 10.0 * n, event) for n, event in enumerate(found, 1)]


def walk(found: list[Event]) -> list[Stored]:
    """Those of the events that can follow, each after those before it."""
    state, kept = None, list[Stored]()
    for event in found:
        try:
            state = apply(state, Stored(len(kept) + 1, 'p1', len(kept) + 1, float(len(kept)), event))
        except OutOfPlaceError:
            continue
        kept.append(Stored(len(kept) + 1, 'p1', len(kept) + 1, float(len(kept)), event))
    return kept


@hypothesis.given(st.one_of([any_event(kind) for kind in KINDS]))
@hypothesis.settings(max_examples=80, deadline=None)
def test_every_event_is_read_as_it_was_stored(event: Event) -> None:
    kind, body = to_row(event)
    assert from_row(kind, json.loads(json.dumps(body))) == event


@pytest.mark.parametrize(
    ('kind', 'body', 'text'),
    [
        ('Danced', {}, "found 'Danced': the store may be of a newer version"),
        ('Withdrew', {}, 'Withdrew: .*reason'),
        ('Withdrew', {'reason': '', 'mood': 'low'}, 'Withdrew.*mood'),
        ('Asked', {'message': 'm', 'conduct': {'smiles': 1}}, 'Asked.*smiles'),
    ],
)
def test_a_damaged_row_is_named(kind: str, body: dict[str, Any], text: str) -> None:
    with pytest.raises(EventError, match=text):
        from_row(kind, body)


@hypothesis.given(st.lists(st.sampled_from(ALPHABET + RARE), max_size=12))
@hypothesis.settings(max_examples=50, deadline=None)
def test_any_events_are_folded_or_refused(found: list[Event]) -> None:
    kept = walk(found)
    if [event.event for event in kept] == found:
        assert (fold(stored(*found)) is None) == (not found)
    else:
        with pytest.raises(OutOfPlaceError, match=r'^p1: event '):
            fold(stored(*found))


def check_follows(state: Participant | None, event: Event) -> None:
    apply(state, Stored(0, 'p1', state.version + 1 if state else 1, 0.0, event))


@hypothesis.given(SEQUENCES)
@hypothesis.settings(max_examples=100, deadline=None)
def test_what_holds_wherever_a_participant_is(found: list[Event]) -> None:
    kept = walk([Arrived('live'), *found])
    states = [fold(kept[:n]) for n in range(1, len(kept) + 1)]
    for before, state, event in zip([None, *states], states, kept, strict=False):
        assert state is not None
        assert state.version == event.version
        assert 1 <= state.page <= state.version
        assert (state.outcome is None) == (state.step != 'over')
        for talk in (state.training, state.main):
            if talk is not None:
                assert all(turn.status == 'judged' for turn in talk.turns[:-1])
                roles = [role for role, _ in talk.messages()]
                assert roles == [('user', 'assistant')[n % 2] for n in range(len(roles))]
                for turn in talk.turns:
                    assert (turn.replies is not None) == (turn.status in ('shown', 'judged'))
                    assert turn.replies is None or {turn.replies.left, turn.replies.right} == set(talk.pair)
        if before is None:
            continue
        if before.was_turned_away and isinstance(event.event, Returned):
            assert (state.step, state.page, state.agreed_at) == ('consent', state.version, None)
            continue
        assert STEPS.index(before.step) <= STEPS.index(state.step)
        if isinstance(event.event, Returned | Flagged | Excluded | PanelStatus):  # nothing that their page shows
            unseen = {'version', 'seen_at', 'flagged', 'excluded', 'other_sessions', 'panel_status'}
            fields = {field.name for field in dataclasses.fields(Participant)} - unseen
            assert all(getattr(before, name) == getattr(state, name) for name in fields)
        elif before.step == 'over':
            assert isinstance(event.event, Deleted)


@hypothesis.given(SEQUENCES, st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_a_fold_knows_only_what_was_stored(found: list[Event], data: st.DataObject) -> None:
    """Through JSON, among events of others, and from any place on: always the same state."""
    kept = walk([Arrived('live'), *found])
    state = fold(kept)
    rows = [json.loads(json.dumps([n.version, n.at, *to_row(n.event)])) for n in kept]
    again = [Stored(7, 'p1', version, at, from_row(kind, body)) for version, at, kind, body in rows]
    assert fold(again) == state
    other = [dataclasses.replace(n, participant='p2') for n in kept]
    study = [Stored(0, events.STUDY, 1, 0.0, PlanFrozen({}, 'h', 'c'))]
    mixed = [n for n in itertools.chain.from_iterable(itertools.zip_longest(kept, study, other)) if n is not None]
    both = fold_all(mixed)
    assert state is not None
    assert both == {'p1': state, 'p2': dataclasses.replace(state, id='p2')}
    cut = data.draw(st.integers(0, len(kept)))
    resumed = fold(kept[:cut])
    for event in kept[cut:]:
        resumed = apply(resumed, event)
    assert resumed == state


def test_one_who_goes_all_the_way() -> None:
    way = [
        Arrived('live'),
        Consented(True, 'plan'),
        Instructed(),
        Checked((1,), False, False),
        Checked((0,), True, True),
        TypeAssigned('story'),
        Prepared('story-1', ('n',), Conduct(3, 4, 5.0)),
        PairAssigned('training', 'a', 'b'),
        Asked('one'),
        Replied('b', 'a', 'B1', 'A1', 1.0, 2.0),
        Preferred('tie', 'right', 'r'),
        PairAssigned('main', 'a', 'b'),
        Asked('two'),
        Voided('down'),
        Retried(),
        Voided('down'),
        Asked('another'),
        Replied('a', 'b', 'A2', 'B2', 1.0, 2.0),
        Preferred('right', 'right', 'r'),
        Concluded(),
        Wrote('text', True),
    ]
    state = fold(stored(*way))
    assert state is not None
    assert (state.step, state.outcome, state.version, state.page) == ('over', 'completed', 21, 21)
    assert (state.agreed_at, len(state.checks), state.document_type) == (20.0, 2, 'story')
    assert state.training is not None
    assert state.main is not None
    assert state.training.messages() == [('user', 'one'), ('assistant', 'A1')]
    assert state.main.messages() == [('user', 'another'), ('assistant', 'B2')]
    [turn] = state.main.turns
    assert (turn.message, turn.voids, turn.asked_at, turn.shown_at, turn.judged_at) == ('another', 2, 170, 180, 190)
    assert turn.preferred is not None
    assert (turn.replies and turn.replies.left, turn.preferred.choice) == ('a', 'right')
    for n, event in enumerate(way[1:], 1):  # each once, in its place
        with pytest.raises(OutOfPlaceError, match=type(event).__name__):
            check_follows(state, event)
        with pytest.raises(OutOfPlaceError, match=f'expected event {n + 2}, found {n + 1}'):
            fold([*stored(*way[: n + 1]), stored(*way)[n]])


@pytest.mark.parametrize(
    ('before', 'event'),
    [
        ([Asked('m')], Replied('a', 'c', 'A', 'C', 1.0, 1.0)),  # of another pair
        ([Asked('m')], Replied('a', 'a', 'A', 'A', 1.0, 1.0)),
        ([Asked('m')], Asked('another')),
        ([Asked('m')], Preferred('left', 'left', 'r')),
        ([Asked('m')], Concluded()),
        ([], Retried()),
        ([], Voided('v')),
        ([], Concluded()),
        ([Asked('m'), Voided('v', refused=True)], Retried()),
        ([Asked('m'), Replied('b', 'a', 'B', 'A', 1.0, 1.0)], Preferred('left', 'right', 'r')),
        ([Asked('m'), Replied('b', 'a', 'B', 'A', 1.0, 1.0)], Voided('v')),
        ([Asked('m'), Replied('b', 'a', 'B', 'A', 1.0, 1.0)], Concluded()),
        ([], PairAssigned('main', 'a', 'b')),
        ([], PairAssigned('training', 'a', 'b')),
    ],
)
def test_what_no_turn_can_be(before: list[Event], event: Event) -> None:
    talk = [PairAssigned('training', 'a', 'b'), Asked('o'), Replied('b', 'a', 'B', 'A', 1.0, 1.0)]
    talk += [Preferred('left', 'left', 'r'), PairAssigned('main', 'a', 'b')]
    begin = [Arrived('live'), Consented(True, 'p'), Instructed(), Checked((0,), True, False), TypeAssigned('story')]
    state = fold(stored(*begin, Prepared('story-1', ()), *talk, *before))
    with pytest.raises(OutOfPlaceError, match=type(event).__name__):
        check_follows(state, event)


def test_events_of_the_study_are_of_no_participant() -> None:
    with pytest.raises(OutOfPlaceError, match='found PlanFrozen in consent'):
        fold(stored(Arrived('live'), PlanFrozen({}, 'h', 'c')))
    with pytest.raises(OutOfPlaceError, match='found Consented before the first'):
        fold(stored(Consented(True, 'p')))


def test_what_was_deleted_is_gone() -> None:
    kept = stored(Arrived('live'), Consented(True, 'plan'), Withdrew('my secret'), Deleted())
    state = fold(kept)
    assert fold([kept[0], kept[3]]) == state  # what a store still has of it
    assert state == Participant('p1', 'live', 'over', 4, 10.0, 40.0, page=4, outcome='deleted')
    for event in (
        Flagged('pasted', 'it says: my secret'),
        Excluded(True, 'r'),
        Returned(True),
        Deleted(),
        Withdrew(''),
    ):
        with pytest.raises(OutOfPlaceError):
            check_follows(state, event)
