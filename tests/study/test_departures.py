"""Results are seen at looks of the plan, or the report states that they were not; so for all that departs from it."""

import dataclasses

import pytest

from simrl.study.departures import NoLookError, counted, departures, is_stored, look_at
from simrl.study.events import STUDY, Excluded, Looked, Opened, Stored
from simrl.study.participant import fold_all
from simrl.study.plan import look_bounds
from simrl.study.settings import PlanSettings
from tests.study.planted import Planted, frozen, planted_study

PLAN = PlanSettings(participants=12, looks=(0.5,))


def study(people, plan=PLAN, mode='live'):
    """Events of people who all complete, after those of the study itself."""
    planted = Planted(people=people, mode=mode)
    events, _ = planted_study(planted, seed=1)
    first = [Opened('1.0', 'config', ('trained', 'initial')), frozen(planted, **dataclasses.asdict(plan))]
    own = [Stored(number, STUDY, number, 0.0, event) for number, event in enumerate(first, 1)]
    return [*own, *(dataclasses.replace(stored, number=stored.number + len(own)) for stored in events)]


def then(events, *more, participant=STUDY):
    """Events with others of the study, or of a participant, after them."""
    version = max(stored.version for stored in events if stored.participant == participant)
    number = events[-1].number
    return [*events, *(Stored(number + n, participant, version + n, 0.0, event) for n, event in enumerate(more, 1))]


def test_nobody_sees_results_before_a_look_of_the_plan():
    events = study(5)
    with pytest.raises(NoLookError, match=r'expected 50% of the 12 planned participants .* found 5 who completed'):
        look_at(events, PLAN, 'live', ' ')
    early = look_at(events, PLAN, 'live', 'a referee asks')
    assert (early.kind, early.completed, early.shares) == ('unplanned', 5, (1.0,))
    assert look_at(study(5, mode='rehearsal'), PLAN, 'rehearsal').kind == 'rehearsal'


def test_a_planned_look_spends_its_alpha_once_and_stays_what_it_was():
    events = study(7)
    look = look_at(events, PLAN, 'live')
    assert (look.kind, look.shares) == ('planned', (7 / 12,))
    assert look.alpha == pytest.approx(look_bounds((7 / 12,), PLAN, 1)[0].alpha)
    assert not is_stored(look, events)
    events = then(events, Looked(7, 40, True, look.alpha))
    assert is_stored(look, events)
    more = [*events, *(dataclasses.replace(s, number=s.number + 1) for s in study(9) if s.number > events[-2].number)]
    again = look_at(more, PLAN, 'live')
    assert (again.kind, again.completed, again.shares, again.until) == ('made', 7, (7 / 12,), events[-1].number)
    assert len(fold_all(counted(more, again.until))) == 7 < len(fold_all(more)) == 9
    full = [*events, *(dataclasses.replace(s, number=s.number + 1) for s in study(12) if s.number > events[-2].number)]
    last = look_at(full, PLAN, 'live')
    assert (last.kind, last.completed, last.shares) == ('planned', 12, (7 / 12, 1.0))
    done = then(full, Looked(12, 70, True, last.alpha))
    assert look_at(done, PLAN, 'live', 'too late for a reason').kind == 'made'
    assert look_at(done, PLAN, 'live').until is None


def said(events, plan=PLAN, mode='live', reason='because'):
    return departures(events, plan, look_at(events, plan, mode, reason), mode)


def test_what_was_planned_departs_from_nothing():
    assert said(study(12)) == []
    assert said(study(5, mode='rehearsal'), mode='rehearsal') == []
    assert said([]) == ['No plan was frozen: nobody has consented.']


def test_departures_are_said():
    events = study(12)
    someone = events[-1].participant
    events = then(
        events, Opened('1.0', 'another', ('trained', 'initial')), Looked(4, 20, False, 0.0, 'a referee asked')
    )
    events = then(events, Excluded(True, 'asked a friend'), participant=someone)
    found = said(events, dataclasses.replace(PLAN, level=0.9))
    assert found == [
        'This analysis has another plan than was frozen: level: 0.95 -> 0.9.',
        'The server was started once with another config than at the first consent; 0 participants arrived at such a '
        'server.',
        'Results by model could be seen once 4 participants had completed, which was not planned: a referee asked.',
        '1 participant was excluded by an administrator, for reasons below; 1 of them after results by model could be '
        'seen.',
    ]
    plan = events[1].event
    other = dataclasses.replace(plan, plan={**plan.plan, 'pairs': [['a', 'b']]}, plan_hash='other')
    found = said([events[0], dataclasses.replace(events[1], event=other), *events[2:]])
    assert found[0] == '12 participants consented while the server had another plan than was frozen.'
    assert found[2] == 'Pairs that were not planned: trained:initial.'
