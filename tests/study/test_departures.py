"""The report states all that departs from the plan that was frozen."""

import dataclasses

from simrl.study.departures import departures
from simrl.study.events import STUDY, Arrived, Excluded, Looked, Opened, RecruitmentEnded, Stored
from simrl.study.looks import look_at
from simrl.study.plan import Plan, read_plan
from simrl.study.settings import PlanSettings
from tests.study.planted import Planted, frozen, planted_study

PLAN = PlanSettings(participants=12, looks=(0.5,))


def whole(plan: PlanSettings) -> Plan:
    """A plan with these settings."""
    return dataclasses.replace(read_plan({}), settings=plan)


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


def said(events, plan=PLAN, mode='live', reason='because'):
    return departures(events, plan, look_at(events, whole(plan), mode, reason), mode)


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


def test_one_who_never_came_into_the_study_departs_from_nothing_if_excluded():
    events = study(12)
    strange = [Arrived('live'), Excluded(True, 'a colleague who tried the link')]
    events += [Stored(events[-1].number + n, 'tester', n, 0.0, event) for n, event in enumerate(strange, 1)]
    assert said(events) == []


def test_fields_of_another_config_are_named():
    events = study(12)
    old = {'task': {'temperature': 0.7, 'tries': 3}, 'texts': 'a1', 'models': {'trained': {'source': 'x'}}}
    new = {'task': {'temperature': 0.1, 'tries': 3}, 'texts': 'b2', 'models': {'trained': {'source': 'y'}}}
    first = dataclasses.replace(events[0], event=dataclasses.replace(events[0].event, config=old))
    starts = [Opened('1.0', 'another', ('trained', 'initial'), new)] * 2
    assert said(then([first, *events[1:]], *starts)) == [
        'The server was started 2 times with another config than at the first consent; 0 participants arrived at such '
        "a server. Other fields: models.trained.source: 'x' -> 'y'; task.temperature: 0.7 -> 0.1; texts: another "
        'content.'
    ]


def test_an_early_end_of_recruitment_is_said():
    ended = RecruitmentEnded('the panel has nobody left')
    assert (
        said(then(study(8), ended))
        == [
            'Recruitment was ended once 8 participants of 12 had completed: the panel has nobody left.',
            '8 participants completed; 12 were planned.',
        ][::-1]
    )
    found = said(then(study(8), Looked(8, 40, True, 0.001), ended))
    assert any(
        '8 participants of 12 had completed, after results by model could be seen: the panel' in x for x in found
    )
    assert said(then(study(12), ended)) == []


def test_a_pair_that_was_turned_round_is_no_other_pair():
    events = study(12)
    turned = dataclasses.replace(events[1].event, plan={**events[1].event.plan, 'pairs': [['initial', 'trained']]})
    assert said([events[0], dataclasses.replace(events[1], event=turned), *events[2:]]) == []
