"""Results are seen at looks of the plan, which spend its alpha once, or at others, which have none."""

import dataclasses

import pytest

from simrl.study.events import Looked, RecruitmentEnded
from simrl.study.looks import (
    NoLookError,
    counted,
    is_stored,
    look_at,
    looks_of,
    open_look,
    to_event,
    unplanned_look,
)
from simrl.study.participant import fold_all
from simrl.study.plan import look_bounds
from tests.study.test_departures import PLAN, study, then, whole

WHOLE = whole(PLAN)


def test_nobody_sees_results_before_a_look_of_the_plan():
    events = study(5)
    with pytest.raises(NoLookError, match=r'expected 50% of the 12 planned participants .* found 5 who completed'):
        look_at(events, WHOLE, 'live', ' ')
    early = look_at(events, WHOLE, 'live', 'a referee asks')
    assert (early.kind, early.completed, early.shares) == ('unplanned', 5, (1.0,))
    assert look_at(study(5, mode='rehearsal'), WHOLE, 'rehearsal').kind == 'rehearsal'


def test_a_planned_look_spends_its_alpha_once_and_stays_what_it_was():
    events = study(7)
    look = look_at(events, WHOLE, 'live')
    assert (look.kind, look.shares) == ('planned', (7 / 12,))
    assert look.alpha == pytest.approx(look_bounds((7 / 12,), PLAN, 1)[0].alpha)
    assert not is_stored(look, events)
    events = then(events, Looked(7, 40, True, look.alpha))
    assert is_stored(look, events)
    more = [*events, *(dataclasses.replace(s, number=s.number + 1) for s in study(9) if s.number > events[-2].number)]
    again = look_at(more, WHOLE, 'live')
    assert (again.kind, again.number, again.completed, again.shares) == ('planned', 1, 7, (7 / 12,))
    assert again.until == events[-1].number
    assert len(fold_all(counted(more, again.until))) == 7 < len(fold_all(more)) == 9
    full = [*events, *(dataclasses.replace(s, number=s.number + 1) for s in study(12) if s.number > events[-2].number)]
    last = look_at(full, WHOLE, 'live')
    assert (last.kind, last.completed, last.shares) == ('planned', 12, (7 / 12, 1.0))
    done = then(full, Looked(12, 70, True, last.alpha))
    again = look_at(done, WHOLE, 'live', 'too late for a reason')
    assert (again.number, again.is_last, again.until) == (2, True, None)


def test_the_last_look_of_a_study_that_ends_early_spends_all_that_is_left():
    """Of 275 planned 283, for instance: with and without interim looks."""
    over = then(study(11), RecruitmentEnded('no money is left'))
    last = look_at(over, WHOLE, 'live')
    assert (last.kind, last.completed, last.shares, last.is_last) == ('planned', 11, (1.0,), True)
    made = then(study(7), Looked(7, 40, True, 0.01))
    with_interim = open_look(then(made, RecruitmentEnded('no money is left')), WHOLE, 11)
    assert with_interim is not None
    assert with_interim.shares == (7 / 12, 1.0)
    assert with_interim.alpha == pytest.approx(look_bounds((7 / 12, 1.0), PLAN, 1)[-1].alpha)
    done = then(over, to_event(last, fold_all(over).values(), 'live'))
    [kept] = looks_of(done, PLAN)
    assert (kept.shares, kept.is_last, kept.until) == ((1.0,), True, None), 'not 11 of 12'
    assert open_look(done, WHOLE, 11) is None


def test_a_look_that_is_not_planned_has_the_level_that_is_left():
    pocock = dataclasses.replace(PLAN, spending='pocock')
    events = then(study(6), Looked(6, 30, True, 0.03))
    look = unplanned_look(events, whole(pocock), 8, ' a referee asks ')
    assert (look.shares, look.reason) == ((0.5, 1.0), 'a referee asks')
    assert look_bounds(look.shares, pocock, 1)[-1].level == pytest.approx(0.9723, abs=1e-4)
    events = then(events, to_event(look, fold_all(events).values(), 'live'))
    first, second = looks_of(events, pocock)
    assert (first.shares, second.shares) == ((0.5,), (0.5, 1.0))
    assert not second.is_last
    last = open_look(events, whole(pocock), 12)
    assert last is not None
    assert last.shares == (0.5, 1.0), 'one that is not planned spends nothing'
    events = then(events, to_event(last, fold_all(events).values(), 'live'))
    assert unplanned_look(events, whole(pocock), 12, 'once more').shares == (0.5, 1.0)
