"""What was planted in a made-up study comes out of its analysis, and who is left out is counted."""

import collections
import dataclasses

import numpy as np
import pytest
import scipy.stats

from simrl.evaluation.multiplicity import holm
from simrl.study.analysis import FIRST_TURNS, PRIMARY, UNDER_WAY, analyse, rejected_by, samples_of
from simrl.study.events import Excluded, Stored
from simrl.study.participant import fold_all
from simrl.study.report.page import sentence
from simrl.study.settings import PlanSettings
from simrl.study.votes import votes
from tests.study.planted import Planted, planted_study

PLAN = PlanSettings()
PAIRS = {('a', 'b'): 0.6, ('a', 'c'): 0.5, ('b', 'c'): 0.42}


def study_of(planted, seed, flags=None):
    events, _ = planted_study(planted, seed)
    people = fold_all(events)
    return people, votes(people.values(), flags=flags or {})


def analysed(planted, seed, plan=PLAN, **options):
    people, found = study_of(planted, seed)
    return analyse(people.values(), found, plan, mode='live', **{'resamples': 1000} | options)


def mean_by_person(found, of=lambda vote: vote.preference):
    each = collections.defaultdict(list)
    for vote in found:
        each[vote.participant].append(of(vote))
    return [np.mean(own) for own in each.values()]


def covers(estimate, truth):
    return not isinstance(estimate, str) and estimate.low is not None and estimate.low <= truth <= estimate.high


def covered(planted, seed):
    """By number, True if its interval covers what was planted in a study of one pair."""
    result = analysed(planted, seed)
    (pair,) = result.pairs
    ((key, truth),) = planted.win_rates.items()
    models = {'gee': pair.gee, 'logit': pair.cumulative_logit}
    return {
        'by participant': covers(pair.rate.estimate, truth),
        'by vote': covers(pair.by_unit.by_vote, truth),
        'naive': covers(pair.by_unit.naive, truth),
        FIRST_TURNS: covers(result.samples[FIRST_TURNS][key].estimate, truth),
        'left': covers(result.left.estimate, 0.5 + planted.position / 2),
        **{name: not isinstance(of, str) and covers(of.win_rate, truth) for name, of in models.items()},
    }


def test_a_planted_effect_is_within_its_interval():
    planted = Planted(people=60, icc=0.2, position=0.15, leaves=0.02)
    found = [covered(planted, seed) for seed in range(6)]
    assert sum(of['by participant'] for of in found) >= 5
    assert sum(of['left'] for of in found) >= 5


@pytest.mark.long
def test_intervals_cover_what_is_planted():
    """The share of 400 studies whose 95% intervals cover what was planted: within 3 standard errors of .95.

    Found, but for the last column with votes of one participant taken for independent:

        icc, participants   by participant  by vote  gee    logit  first turns  position  naive
        .1, 94              .948            .950     .953   .950   .958         .943      .888
        .3, 60              .935            .948     .950   .945   .945         .953      .805
    """
    for icc, people in ((0.1, 94), (0.3, 60)):
        planted = Planted(people=people, icc=icc, position=0.1, leaves=0.02)
        found = [covered(planted, seed) for seed in range(400)]
        shares = {name: np.mean([of[name] for of in found]) for name in found[0]}
        print(icc, people, shares)
        naive = shares.pop('naive')
        assert all(0.917 < share < 0.983 for share in shares.values()), shares
        if icc > 0.2:
            assert naive < 0.85


def test_rates_and_p_values_are_those_of_scipy():
    people, found = study_of(Planted(people=45, win_rates=PAIRS, position=0.1, leaves=0.03), seed=1)
    result = analyse(people.values(), found, PLAN, mode='live', resamples=200)
    completed = [vote for vote in found if vote.outcome == 'completed']
    p_values = []
    for pair in result.pairs:
        own = [vote for vote in completed if vote.pair == (pair.first, pair.second)]
        means = mean_by_person(own)
        assert pair.rate.estimate.mean == pytest.approx(np.mean(means))
        assert pair.rate.p_value == pytest.approx(scipy.stats.ttest_1samp(means, 0.5).pvalue)
        assert pair.left.estimate.mean == pytest.approx(
            np.mean(mean_by_person(own, lambda v: {'left': 1, 'tie': 0.5, 'right': 0}[v.choice]))
        )
        assert (pair.wins, pair.ties, pair.losses) == tuple(
            sum(vote.preference == value for vote in own) for value in (1, 0.5, 0)
        )
        p_values.append(pair.rate.p_value)
        for turn, rate in pair.turns.items():
            values = [vote.preference for vote in own if vote.turn == turn]
            assert rate.votes == len(values)
            assert rate.estimate.mean == pytest.approx(np.mean(values))
        assert sum(rate.votes for rate in pair.tasks.values()) == len(own)
        assert sum(rate.participants for rate in pair.types.values()) == len(means)
    adjusted = list(holm(dict(enumerate(p_values))).values())
    assert [pair.adjusted_p for pair in result.pairs] == pytest.approx(adjusted)
    assert [pair.significant for pair in result.pairs] == [p <= 0.05 for p in adjusted]
    assert result.ranking.models[-1] == 'c' or result.ranking.models[0] == 'c'


def test_by_vote_is_its_own_unit():
    result = analysed(Planted(people=30), 2, dataclasses.replace(PLAN, primary='vote'))
    (pair,) = result.pairs
    assert pair.rate.estimate == pair.by_unit.by_vote != pair.by_unit.by_participant
    assert (pair.rate.p_value < 0.05) == (not covers(pair.rate.estimate, 0.5))


def test_exchanging_the_models_mirrors_everything():
    planted = Planted(people=24, win_rates={('a', 'b'): 0.62}, position=0.2)
    people, found = study_of(planted, 3)
    mirrored = [dataclasses.replace(v, pair=v.pair[::-1], preference=1 - v.preference) for v in found]
    one, two = (analyse(people.values(), own, PLAN, mode='live', resamples=500).pairs[0] for own in (found, mirrored))
    assert two.rate.estimate.mean == pytest.approx(1 - one.rate.estimate.mean)
    assert two.rate.p_value == pytest.approx(one.rate.p_value)
    assert two.gee.win_rate.value == pytest.approx(1 - one.gee.win_rate.value)
    assert two.gee.position.value == pytest.approx(one.gee.position.value)
    assert two.left.estimate == one.left.estimate
    assert two.longer == one.longer


def test_holm_is_what_is_left_without_interim_looks():
    random = np.random.default_rng(0)
    pairs = [('a', 'b'), ('a', 'c'), ('b', 'c')]
    seen = set()
    for _ in range(20):
        p_values = dict(zip(pairs, random.random(3) ** 5, strict=True))
        found = rejected_by(p_values, PLAN, (1.0,))
        assert found == {pair for pair, p in holm(p_values).items() if p <= 0.05}
        seen.add(len(found))
    assert len(seen) > 2
    early = dict.fromkeys(pairs, 0.004)
    assert rejected_by(early, PLAN, (1.0,)) == set(pairs)
    assert rejected_by(early, PLAN, (0.5,)) == set(), 'O’Brien and Fleming spend little of alpha half way'


def test_everybody_is_counted_once_and_every_exclusion_has_its_reason():
    planted = Planted(people=60, leaves=0.05, declines=0.1, fails=0.1, named=0.1)
    events, _ = planted_study(planted, 4)
    done = [one.id for one in fold_all(events).values() if one.outcome == 'completed']
    for number, (name, reason) in enumerate([(done[0], 'asked a friend'), (done[1], ''), (done[2], 'asked a friend')]):
        last = max(stored.version for stored in events if stored.participant == name)
        events.append(Stored(10_000 + number, name, last + 1, 0.0, Excluded(True, reason)))
    flags = {done[0]: ('fast',), done[3]: ('fast', 'pasted'), done[4]: ('pasted',)}
    people = fold_all(events)
    found = votes(people.values(), flags=flags)
    plan = PlanSettings(excluded_flags=('fast',))
    result = analyse(people.values(), found, plan, mode='live', resamples=200)
    counts = result.flow
    assert counts.arrived == sum(counts.ends.values()) == 60
    assert set(counts.ends) == {'completed', 'declined', 'failed_check', 'withdrawn', UNDER_WAY}
    assert counts.excluded == {'asked a friend': 2, 'no reason given': 1}
    assert counts.flags == {'fast': 2, 'pasted': 2}
    assert counts.excluded_by_flag == 1
    assert (
        counts.primary
        == counts.ends['completed'] - 3 - 1
        == len({v.participant for v in samples_of(found, plan)[PRIMARY]})
    )
    sizes = {name: sum(rate.votes for rate in rates.values()) for name, rates in result.samples.items()}
    assert sizes['all votes, also of those who left'] == len(found)
    assert sizes['with excluded participants, too'] == len(found) - counts.unfinished_votes
    assert sizes['without turns in which a model may name itself'] == sizes[PRIMARY] - counts.named < sizes[PRIMARY]
    assert sizes['without participants with any flag'] < sizes[PRIMARY] < sizes['with flagged participants']
    assert sizes[FIRST_TURNS] == counts.primary


def test_no_votes_are_no_error():
    result = analyse([], [], PLAN, mode='live')
    assert (result.pairs, result.left, result.ranking) == ((), None, None)
    people, found = study_of(Planted(people=1), 0)
    (pair,) = analyse(people.values(), found, PLAN, mode='live').pairs
    assert pair.rate.p_value is None
    assert not pair.significant
    assert 'expected' in pair.gee


def test_what_cannot_be_said_is_not_called_insignificant():
    people, found = study_of(Planted(people=3), 0)
    first = [vote for vote in found if vote.participant == found[0].participant]
    alike = [dataclasses.replace(vote, choice='tie', preference=0.5) for vote in found]
    for some, reason in ((first, 'too few participants'), (alike, 'participants do not differ')):
        (pair,) = analyse(people.values(), some, PLAN, mode='live', resamples=100).pairs
        assert (pair.rate.untested, pair.significant) == (reason, False)
        assert f' cannot be said: {reason}; the win rate' in sentence(pair, 1)
        assert 'significant' not in sentence(pair, 1)
    assert '(1 participant, ' in sentence(analyse(people.values(), first, PLAN, mode='live', resamples=100).pairs[0], 1)
    (pair,) = analyse(people.values(), found, PLAN, mode='live', resamples=100).pairs
    assert not pair.rate.untested
    assert sentence(pair, 1).startswith('Participants do not significantly prefer')
