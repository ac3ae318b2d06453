"""Sizes and interim looks: against published tables, other implementations, planted clustering; nothing unblinded."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simrl.evaluation.power import Design, people_needed
from simrl.run.config import ConfigError
from simrl.study.flags import ScreenSettings
from simrl.study.plan import (
    Clustering,
    alpha_spent,
    assumed,
    blind_clustering,
    look_bounds,
    next_look,
    planned_size,
    read_plan,
)
from simrl.study.settings import PlanSettings, StudyModel, StudySettings, plan_of


def test_a_frozen_plan_is_read_back_through_json():
    endpoint = StudyModel(source='x')
    settings = StudySettings(
        models={'a': endpoint, 'b': endpoint},
        plan=PlanSettings(looks=(0.3,), spending='pocock', excluded_flags=('fast',)),
        screens=ScreenSettings(vote_seconds=7.5),
    )
    plan = json.loads(json.dumps(plan_of(settings)))
    found = read_plan(plan)
    assert (found.settings, found.screens, found.pairs) == (settings.plan, settings.screens, settings.compared)
    assert read_plan({}).settings == PlanSettings()
    with pytest.raises(ConfigError, match=r'plan\.power'):
        read_plan({**plan, 'power': 'much'})


PLAN = PlanSettings(participants=200, looks=(0.25, 0.5))


@pytest.mark.parametrize(
    ('spending', 'published'),
    [  # ld98 and its successors, equal shares, two-sided .05 (Reboussin, DeMets, Kim & Lan 2000)
        ('obrien_fleming', (2.9626, 1.9686)),
        ('obrien_fleming', (3.7103, 2.5114, 1.9930)),
        ('obrien_fleming', (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
        ('pocock', (2.1570, 2.2010)),
        ('pocock', (2.2794, 2.2949, 2.2959)),
        ('pocock', (2.4380, 2.4268, 2.4101, 2.3966, 2.3859)),
    ],
)
def test_bounds_are_the_published_ones(spending, published):
    shares = [(n + 1) / len(published) for n in range(len(published))]
    bounds = look_bounds(shares, PlanSettings(spending=spending), 1)
    assert [bound.z for bound in bounds] == pytest.approx(published, abs=2e-4)
    assert sum(bound.alpha for bound in bounds) == pytest.approx(0.05)


@pytest.mark.parametrize('spending', ['obrien_fleming', 'pocock'])
def test_bounds_of_unequal_looks_spend_what_they_may(spending):
    """By the multivariate normal distribution of z at all looks, which the integration does not use."""
    shares = np.array([0.3, 0.42, 1.0])
    bounds = look_bounds(shares, PlanSettings(spending=spending), 3)
    covariance = np.sqrt(np.minimum.outer(shares, shares) / np.maximum.outer(shares, shares))
    for number, bound in enumerate(bounds, 1):
        z = np.array([bound.z for bound in bounds[:number]])
        inside = stats.multivariate_normal(cov=covariance[:number, :number], seed=0, abseps=1e-7, releps=1e-7)
        assert 1 - inside.cdf(z, lower_limit=-z) == pytest.approx(bound.spent, rel=2e-3, abs=1e-6)
        assert bound.level == pytest.approx(1 - 2 * stats.norm.sf(bound.z))
    assert bounds[-1].spent == pytest.approx(0.05 / 3)


def test_spending_starts_at_nothing_and_ends_at_alpha():
    for spending in ('obrien_fleming', 'pocock'):
        spent = [alpha_spent(share, 0.05, spending) for share in np.linspace(0.01, 1, 50)]
        assert spent == sorted(spent)
        assert spent[-1] == pytest.approx(0.05)
        assert spent[0] < 0.002
    early = look_bounds((0.01, 0.5), PLAN, 1)
    assert early[0].z == np.inf  # nothing is spent: no result is significant
    assert early[1].z == pytest.approx(look_bounds((0.5,), PLAN, 1)[0].z)


@pytest.mark.parametrize(
    ('shares', 'says'),
    [((0.5, 0.5), 'rising shares'), ((0.5, 0.2), 'rising shares'), ((0.0,), 'in (0, 1]'), ((1.2,), 'in (0, 1]')],
)
def test_impossible_shares_are_refused(shares, says):
    with pytest.raises(ValueError, match=says.replace('(', r'\(')):
        look_bounds(shares, PLAN, 1)


def test_looks_are_open_at_their_shares_and_once():
    assert next_look(PLAN, 1, 49, []) is None
    opened = next_look(PLAN, 1, 60, [])
    assert opened is not None
    assert opened.share == 0.3  # of those who are there, not the planned share
    assert next_look(PLAN, 1, 99, [0.3]) is None
    second = next_look(PLAN, 1, 100, [0.3])
    assert second is not None
    assert second == look_bounds((0.3, 0.5), PLAN, 1)[-1]
    assert next_look(PLAN, 1, 199, [0.6]) is None  # both shares were passed before the first look
    last = next_look(PLAN, 1, 210, [0.3, 0.5])
    assert last is not None
    assert (last.share, last.spent) == (1.0, pytest.approx(0.05))
    assert next_look(PLAN, 1, 230, [0.3, 1.0]) is None


def test_the_last_look_is_open_once_recruitment_is_over():
    assert next_look(PLAN, 1, 190, [0.3, 0.5]) is None
    last = next_look(PLAN, 1, 190, [0.3, 0.5], is_over=True)
    assert last == look_bounds((0.3, 0.5, 1.0), PLAN, 1)[-1]
    assert last.spent == pytest.approx(0.05)
    assert next_look(PLAN, 1, 190, [0.3, 1.0], is_over=True) is None


def planted(icc: float, people: int, turns: int, win_rates: dict[str, float], seed: int):
    """With probability sqrt(icc) a vote is the participant's own fixed one: two of them correlate at icc."""
    random = np.random.default_rng(seed)
    preferences, participants, pairs = [], [], []
    for pair, rate in win_rates.items():
        for person in range(people):
            mine, count = random.random(), turns + random.integers(3)
            drawn = np.where(random.random(count) < icc**0.5, mine, random.random(count))
            preferences += np.where(drawn < rate - 0.1, 1.0, np.where(drawn < rate + 0.1, 0.5, 0.0)).tolist()
            participants += [f'{pair}{person}'] * count
            pairs += [pair] * count
    return np.array(preferences), participants, pairs


@pytest.mark.parametrize('icc', [0.0, 0.1, 0.4])
def test_planted_clustering_is_found_whatever_the_win_rates(icc):
    found = blind_clustering(*planted(icc, 1500, 5, {'x': 0.5, 'y': 0.75, 'z': 0.3}, 1))
    assert found.icc == pytest.approx(icc, abs=0.02)
    assert found.low <= icc <= found.high or icc == pytest.approx(found.icc, abs=0.01)
    assert (found.participants, found.turns) == (4500, 5)
    assert found.ties == pytest.approx(0.2, abs=0.01)
    assert found.is_known


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sets(st.sampled_from('xyz')))
def test_clustering_does_not_depend_on_who_wins(seed, exchanged):
    """Exchanging the models of any pairs changes no number, so that none can tell which one is preferred."""
    preferences, participants, pairs = planted(0.2, 12, 2, {'x': 0.5, 'y': 0.8, 'z': 0.3}, seed)
    turned = np.where([pair in exchanged for pair in pairs], 1 - preferences, preferences)
    found, other = (blind_clustering(votes, participants, pairs) for votes in (preferences, turned))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(other))


def test_clustering_is_that_of_plain_loops():
    preferences, participants, pairs = planted(0.3, 15, 1, {'x': 0.5, 'y': 0.8}, 3)
    rows = list(zip(preferences, participants, pairs, strict=True))
    people = {who: [value for value, name, _ in rows if name == who] for who in participants}
    of_pair = {pair: [value for value, _, name in rows if name == pair] for pair in pairs}
    between = within = weight = 0.0
    for who, own in people.items():
        pair = of_pair[who[0]]
        between += len(own) * (np.mean(own) - np.mean(pair)) ** 2
        within += sum((value - np.mean(own)) ** 2 for value in own)
        weight += len(own) ** 2 / len(pair)
    between, within = between / (len(people) - 2), within / (len(rows) - len(people))
    size = (len(rows) - weight) / (len(people) - 2)
    found = blind_clustering(preferences, participants, pairs)
    assert found.icc == pytest.approx((between - within) / (between + (size - 1) * within))
    assert found.turns == int(len(people) / sum(1 / len(own) for own in people.values()))


@pytest.mark.parametrize(
    ('preferences', 'participants'),
    [([], []), ([1.0], ['a']), ([1.0, 0.0], ['a', 'b']), ([1.0, 0.0], ['a', 'a']), ([1.0] * 4, ['a', 'a', 'b', 'b'])],
)
def test_too_few_votes_say_nothing_of_clustering(preferences, participants):
    found = blind_clustering(preferences, participants, ['x'] * len(preferences))
    assert found.icc is None
    assert not found.is_known
    with pytest.raises(ValueError, match='expected an icc'):
        planned_size(PLAN, 1, found)


def test_few_participants_are_not_relied_on():
    found = blind_clustering(*planted(0.2, 6, 5, {'x': 0.5}, 0))
    assert found.icc is not None
    assert not found.is_known


def test_sizes_are_those_of_the_power_analysis():
    plan = PlanSettings(effect=0.58, tie_share=0.2, clustering=0.1)
    one, three = (planned_size(plan, pairs, assumed(plan, 5)) for pairs in (1, 3))
    assert one.per_pair == people_needed(Design(win_rate=0.58, ties=0.2, turns=5, icc=0.1, level=0.95))
    assert three.per_pair == people_needed(Design(win_rate=0.58, ties=0.2, turns=5, icc=0.1, level=1 - 0.05 / 3))
    assert three.total == 3 * three.per_pair > 3 * one.total
    looking = planned_size(dataclasses.replace(plan, looks=(0.5,), spending='pocock'), 1, assumed(plan, 5))
    assert looking.per_pair > one.per_pair  # alpha that looks spend is paid for
    known = Clustering(50, 250, 5, 0.9, 1.0, 0.9, 1.0)  # more ties than the effect leaves room for, and all alike
    assert planned_size(plan, 1, known).design.ties == pytest.approx(0.84)
