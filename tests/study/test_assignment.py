"""Draws are fair and know no names; places are filled evenly, whoever leaves."""

import collections
import dataclasses
import heapq
import itertools
import random
from collections.abc import Iterable

import pytest
import scipy.stats

from simrl.study import assignment
from simrl.study.assignment import counts, document_type, draw_key, first_is_left, kept_of_tie, main_pair, training_pair
from simrl.study.events import Arrived, Excluded, Stored
from simrl.study.participant import Participant, Talk, apply
from simrl.study.settings import StudySettings
from tests.study.studies import settings

TYPES = ('story', 'post', 'letter')
THREE = settings(('a', 'b', 'c'))
KEY = draw_key(b'of a store', 0)
IDS = [f'p{n}' for n in range(2000)]


def fairness(found: Iterable[object], among: int) -> float:
    """The p-value of equal chances (chi-square)."""
    numbers = collections.Counter(found)
    return float(scipy.stats.chisquare([*numbers.values(), *[0] * (among - len(numbers))]).pvalue)


def person(id: str, at: float = 0.0, **fields: object) -> Participant:
    made = apply(None, Stored(1, id, 1, at, Arrived('live')))
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def test_sides_are_fair_and_balanced_within_a_person() -> None:
    firsts = [first_is_left(KEY, id, 'main', 0) for id in IDS]
    assert fairness(firsts, 2) > 0.01
    sides = [[first_is_left(KEY, id, 'main', turn) for turn in range(12)] for id in IDS]
    assert all(sum(own[:6]) == sum(own[6:]) == 3 for own in sides)
    assert fairness([tuple(own[:6]) for own in sides], 20) > 0.01
    later = [(own[5], own[6]) for own in sides]  # blocks of a person know nothing of each other
    assert fairness(later, 4) > 0.01
    for turn in (1, 2):  # whatever came before, the next one is not certain
        seen = collections.defaultdict(set)
        for own in sides:
            seen[tuple(own[:turn])].add(own[turn])
        assert all(len(next_ones) == 2 for next_ones in seen.values())
    both = [(first_is_left(KEY, id, 'training', 0), first) for id, first in zip(IDS, firsts, strict=True)]
    assert fairness(both, 4) > 0.01


def test_replies_after_ties_are_fair_and_independent_of_sides() -> None:
    drawn = [
        (kept_of_tie(KEY, id, 'main', turn), first_is_left(KEY, id, 'main', turn))
        for id in IDS[:1000]
        for turn in (0, 1)
    ]
    assert fairness(drawn, 4) > 0.01


def test_training_pairs_are_fair() -> None:
    assert fairness([training_pair(THREE, KEY, id) for id in IDS], 3) > 0.01


def test_draws_need_the_stores_secret_and_the_seed() -> None:
    def draws(secret: bytes, seed: int) -> list[bool]:
        return [first_is_left(draw_key(secret, seed), id, 'main', 0) for id in IDS]

    assert draws(b'one', 0) == draws(b'one', 0)
    for secret, seed in ((b'one', 1), (b'other', 0)):
        same = [a == b for a, b in zip(draws(b'one', 0), draws(secret, seed), strict=True)]
        assert 800 < sum(same) < 1200


def test_swapped_models_change_no_other_draw() -> None:
    """The first model of the config has the sides that the other one had: nothing but the names is swapped."""
    swapped = settings(('c', 'b', 'a'), pairs=('c:b', 'c:a', 'b:a'))
    names = {'a': 'c', 'b': 'b', 'c': 'a'}
    given = settings(('a', 'b', 'c'))
    for id in IDS[:50]:
        pair = training_pair(given, KEY, id)
        assert training_pair(swapped, KEY, id) == tuple(names[name] for name in pair)
        assert main_pair(swapped, KEY, person(id, document_type='post'), [], 0.0) == tuple(
            names[name] for name in main_pair(given, KEY, person(id, document_type='post'), [], 0.0)
        )


def test_whoever_is_here_or_has_completed_fills_a_place() -> None:
    def fills(now: float = 100.0, **fields: object) -> bool:
        return counts(person('p', 50.0, **fields), now, gone_seconds=60.0)

    assert fills()
    assert fills(now=110.0)
    assert not fills(now=110.1)
    assert fills(now=9e9, step='over', outcome='completed')
    for outcome in ('withdrawn', 'deleted', 'closed', 'failed_check', 'declined'):
        assert not fills(step='over', outcome=outcome)
    assert not fills(mode='preview')
    assert not fills(excluded=Excluded(True, 'a robot'))
    assert fills(excluded=Excluded(False, 'none, after all'))
    assert not fills(panel_status='RETURNED')
    assert not fills(panel_status='TIMED-OUT')
    assert fills(panel_status='ACTIVE')
    assert fills(panel_status='RETURNED', step='over', outcome='completed')


def test_the_least_filled_type_and_pair_are_next() -> None:
    study = settings(('a', 'b', 'c'))
    others = [person(f'o{n}', document_type=name) for n, name in enumerate(['story', 'story', 'letter'])]
    assert document_type(study, KEY, TYPES, 'p', others, 0.0) == 'post'
    assert document_type(study, KEY, TYPES, 'p', [], 0.0) in TYPES

    def writing(kind: str, *pairs: tuple[str, str]) -> list[Participant]:
        return [person(f'{kind}{n}', document_type=kind, main=Talk(pair, 0.0)) for n, pair in enumerate(pairs)]

    state = person('p', document_type='post')
    filled = writing('post', ('a', 'b'), ('b', 'c')) + writing('story', *[('a', 'c')] * 5)
    assert main_pair(study, KEY, state, filled, 0.0) == ('a', 'c')  # in the cell none, though five write stories
    filled = writing('post', ('a', 'b'), ('b', 'c'), ('a', 'c')) + writing('story', ('a', 'b'), ('c', 'b'))
    assert main_pair(study, KEY, state, filled, 0.0) == ('a', 'c')  # cells are equal: the fewest over all types
    draws = [main_pair(study, KEY, person(id, document_type='post'), [], 0.0) for id in IDS[:500]]
    assert fairness(draws, 3) > 0.01


@pytest.mark.parametrize('leaving', ['anyone', 'of one cell'])
def test_places_stay_balanced_though_people_leave(leaving: str) -> None:
    """2,000 come, of whom some 15 are here at once, and 30% leave without a word: anyone, or most of one cell."""
    study: StudySettings = dataclasses.replace(THREE, gone_seconds=600.0)
    draws = random.Random(0)
    people: dict[str, Participant] = {}
    ends: list[tuple[float, str]] = []  # of those who complete
    assigned = collections.Counter[tuple[str, ...]]()
    for n, id in enumerate(IDS):
        now = 30.0 * n
        while ends and ends[0][0] <= now:
            _, over = heapq.heappop(ends)
            people[over] = dataclasses.replace(people[over], step='over', outcome='completed')
        # Who is gone for good is no longer handed over: it changes nothing, and the test takes less time.
        here = [other for other in people.values() if other.outcome or now - other.seen_at <= 600.0]
        kind = document_type(study, KEY, TYPES, id, here, now)
        state = person(id, now, document_type=kind)
        pair = main_pair(study, KEY, state, here, now)
        people[id] = dataclasses.replace(state, main=Talk(pair, now))
        assigned[kind, *pair] += 1
        chance = 0.3 if leaving == 'anyone' else 0.6 if (kind, pair) == ('post', ('a', 'b')) else 0.2
        if draws.random() >= chance:
            heapq.heappush(ends, (now + draws.uniform(300.0, 590.0), id))
    completed = collections.Counter(
        (state.document_type, state.main.pair) for state in people.values() if state.outcome and state.main
    )
    cells = list(itertools.product(TYPES, study.compared))
    found = [completed[cell] for cell in cells]
    assert 1200 < sum(found) < 1600
    assert scipy.stats.chisquare(found).pvalue > 0.5  # much better than draws
    assert max(found) - min(found) <= 12
    if leaving == 'of one cell':  # others took the places of those who left
        assert assigned['post', 'a', 'b'] > 1.5 * assigned['story', 'a', 'b']


def test_draws_are_spread_over_all_numbers() -> None:
    assert {assignment.draw(KEY, 5, n) for n in range(100)} == set(range(5))
    assert fairness([assignment.draw(KEY, 7, 'x', n) for n in range(10_000)], 7) > 0.01
