"""Conversations without an outcome: every number against a slow loop over the examples that it is of."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.evaluation.gap_recovered import gaps_recovered
from simrl.evaluation.matrix import transfers
from simrl.evaluation.outcomes import compare, outcomes_of, summarise
from simrl.evaluation.preferences import cluster_robust
from simrl.evaluation.results.measures import Arm
from simrl.evaluation.shares import cluster_shares
from simrl.evaluation.statistics import cluster_bootstraps, percentile_interval
from tests.evaluation.made_up import FAILURE, columns, compared_arms, outcomes, vote

NAMES = ('initial', 'a_0', 'a_1', 'b_0', 'b_1')
VALUES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def scores(draw):
    """By assistant, on 3 to 8 examples of which all have a score on the first two."""
    number = draw(st.integers(3, 8))
    rest = st.lists(VALUES | st.none(), min_size=number - 2, max_size=number - 2)
    return {name: [draw(VALUES), draw(VALUES), *draw(rest)] for name in NAMES}


def mean(values):
    return sum(values) / len(values)


def over_seeds(*seeds):
    """By example, the mean over the seeds that have a score."""
    there = [[x for x in scores if x is not None] for scores in zip(*seeds, strict=True)]
    return [mean(scores) if scores else None for scores in there]


def pairs(first, second):
    return [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]


def with_failures(own, initial, prefer, value):
    """By example, the preference for the assistant; `value` where either has no score."""
    return [value if None in (x, y) else prefer(x, y) for x, y in zip(own, initial, strict=True)]


def check_bounds(found, own, initial, prefer):
    if None not in (*own, *initial):
        assert found is None, 'nothing failed'
        return
    for estimate, value in ((found.lost, 0.0), (found.won, 1.0)):
        assert estimate.mean == pytest.approx(mean(with_failures(own, initial, prefer, value)))
        assert estimate.num_observations == len(own)


@settings(max_examples=60, deadline=None)
@given(scores())
def test_every_mean_is_over_the_examples_that_both_sides_have(scores):
    found = outcomes(**scores)
    one = summarise(found, compare(found, vote), resamples=20)
    arms, (difference,) = compared_arms(found, resamples=20)
    for name, own in scores.items():
        result = one[name.replace('_', '/seed-')]
        there = [x for x in own if x is not None]
        assert (result.score.mean, result.score.num_observations) == (pytest.approx(mean(there)), len(there))
        assert result.parts['share_met'].mean == pytest.approx(mean(there))
        assert result.causes == ({} if len(there) == len(own) else {FAILURE: len(own) - len(there)})
        assert (result.ends, result.labels) == ({'accepted': 1.0}, {'first_act': {'ask': 1.0}})
        assert (result.assistant_turns, result.truncated, result.user_truncated) == (2.0, 0.0, 0.0)
        if name != 'initial':
            both = pairs(own, scores['initial'])
            assert result.gain.num_observations == result.win_rate.num_observations == len(both)
            assert result.gain.mean == pytest.approx(mean([x - y for x, y in both]))
            assert result.win_rate.mean == pytest.approx(mean([vote(x, y) for x, y in both]))
            assert result.strict_win_rate.mean == pytest.approx(mean([(x > y) + (x == y) / 2 for x, y in both]))
            check_bounds(result.win_rate_bounds, own, scores['initial'], vote)
            check_bounds(result.strict_win_rate_bounds, own, scores['initial'], lambda x, y: (x > y) + (x == y) / 2)
    for arm in 'ab':
        seeds = [scores[f'{arm}_{seed}'] for seed in (0, 1)]
        gains = [mean([x - y for x, y in pairs(own, scores['initial'])]) for own in seeds]
        assert arms[arm].gain.values == pytest.approx(gains)
        assert arms[arm].compared == tuple(len(pairs(own, scores['initial'])) for own in seeds)
        if (bounds := arms[arm].win_rate_bounds) is None:
            assert not any(None in own for own in (*seeds, scores['initial']))
        else:
            for found, value in ((bounds.lost, 0.0), (bounds.won, 1.0)):
                rates = [mean(with_failures(own, scores['initial'], vote, value)) for own in seeds]
                assert found.values == pytest.approx(rates)
        in_all = [row for row in zip(*seeds, scores['initial'], strict=True) if None not in row]
        crossed = arms[arm].gain_intervals.crossed
        assert crossed.values == pytest.approx([mean([row[s] - row[2] for row in in_all]) for s in (0, 1)])
        assert (crossed.num_observations, crossed.left_out) == (len(in_all), len(seeds[0]) - len(in_all))
        both = pairs(over_seeds(*seeds), scores['initial'])
        assert arms[arm].checkpoint_gain.num_observations == len(both)
        assert arms[arm].checkpoint_gain.mean == pytest.approx(mean([x - y for x, y in both]))
    by_seed = [(scores[f'b_{seed}'], scores[f'a_{seed}']) for seed in (0, 1)]
    assert difference.score.values == pytest.approx([mean([x - y for x, y in pairs(*both)]) for both in by_seed])
    assert difference.compared == tuple(len(pairs(*both)) for both in by_seed)
    rates = []
    for first, second in by_seed:
        rows = [row for row in zip(first, second, scores['initial'], strict=True) if None not in row]
        rates.append(mean([vote(x, z) - vote(y, z) for x, y, z in rows]))
    assert difference.win_rate.values == pytest.approx(rates)
    of_seeds = [[None if None in both else both[0] - both[1] for both in zip(*x, strict=True)] for x in by_seed]
    there = [x for x in over_seeds(*of_seeds) if x is not None]
    assert difference.checkpoint_score.num_observations == len(there)
    assert difference.checkpoint_score.mean == pytest.approx(mean(there))


@settings(max_examples=30, deadline=None)
@given(scores(), st.integers(2, 7))
def test_what_fails_with_one_assistant_shifts_no_other(scores, lost):
    """All numbers of the other arm, and of the initial assistant, stay as they were to the bit.

    But for its pooled intervals, which have the spread of all arms.
    """
    fewer = scores | {'a_1': [None if i == lost else x for i, x in enumerate(scores['a_1'])]}
    (before, (arms_before, _)), (after, (arms_after, _)) = (
        (summarise(found, compare(found, vote), resamples=20), compared_arms(found, resamples=20))
        for found in (outcomes(**scores), outcomes(**fewer))
    )
    assert {name: x for name, x in before.items() if name != 'a/seed-1'} == {
        name: x for name, x in after.items() if name != 'a/seed-1'
    }
    fields = ('gain_intervals', 'win_rate_intervals')
    without_pooled = [
        dataclasses.replace(arm, **{name: dataclasses.replace(getattr(arm, name), pooled=None) for name in fields})
        for arm in (arms_before['b'], arms_after['b'])
    ]
    assert without_pooled[0] == without_pooled[1]


@pytest.mark.parametrize('data', range(5))
@pytest.mark.parametrize(('number', 'percentiles'), [(1, False), (3, False), (5, False), (8, True), (10, True)])
def test_intervals_resample_clusters_and_leave_missing_values_out(number, percentiles, data):
    """Of `number` clusters, one more of which has no value; of few the interval is Student's."""
    random = np.random.default_rng([number, data])
    clusters = [*range(number), *random.integers(0, number, 20).tolist(), number]
    values = np.where(random.random(len(clusters)) < 0.2, np.nan, random.choice([0.0, 0.25, 0.5, 1.0], len(clusters)))
    values[:number], values[-1] = random.random(number), np.nan
    values, whole = values.tolist(), random.random(len(clusters)).tolist()
    found, other = cluster_bootstraps([values, whole], clusters, resamples=40, seed=3, nan='missing')
    (alone,) = cluster_bootstraps([whole], clusters, resamples=40, seed=3)
    for name, value in dataclasses.asdict(alone).items():
        assert getattr(other, name) == (value if value is None else pytest.approx(value)), (
            'a measure depends on no other'
        )
    names = list(dict.fromkeys(clusters))
    draws = np.random.default_rng(3).integers(0, len(names), (40, len(names)))
    means = []
    for draw in draws:
        drawn = [
            value
            for number in draw
            for value, cluster in zip(values, clusters, strict=True)
            if cluster == names[number] and value == value
        ]
        if drawn:
            means.append(mean(drawn))
    there = [(value, cluster) for value, cluster in zip(values, clusters, strict=True) if value == value]
    assert found.mean == pytest.approx(mean([value for value, _ in there]))
    assert (found.num_observations, found.num_clusters) == (len(there), len({cluster for _, cluster in there}))
    assert found.undefined_draws == pytest.approx(1 - len(means) / 40)
    if percentiles:
        bound = math.sqrt(number / (number - 1)) * scipy.stats.t.ppf(0.975, number - 1)
        tail = scipy.stats.norm.cdf(-bound)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])))
    else:
        robust = cluster_robust([value for value, _ in there], [cluster for _, cluster in there])
        low, high = (bound if bound is None else pytest.approx(bound) for bound in (robust.low, robust.high))
        assert (found.low, found.high) == (low, high)
        assert (low is None) == (number == 1)
    (share,) = cluster_shares([values], clusters, nan='missing')
    (same,) = cluster_shares([[value for value, _ in there]], [cluster for _, cluster in there])
    for name, value in dataclasses.asdict(same).items():  # the order of clusters, and so of a sum, may be another
        assert getattr(share, name) == (value if value is None else pytest.approx(value))


def test_too_many_draws_without_a_value_leave_no_interval():
    """Two of eight people have a value: (6/8)^8 of the draws, a tenth, have none. Of six hardly any lacks one."""
    nan = float('nan')
    few, some = [0.2, 0.9] + [nan] * 6, [0.2, 0.9, 0.1, 0.3, 0.5, 0.6, nan, nan]
    values = [few * 4, some * 4]
    people = list(range(8)) * 4
    found = cluster_bootstraps([*values, [x if x == x else 0.4 for x in few * 4]], people, nan='missing')
    assert [x.num_clusters for x in found] == [2, 6, 8]
    assert found[0].undefined_draws == pytest.approx(0.75**8, abs=0.01)
    assert found[1].undefined_draws == pytest.approx(0.25**8, abs=0.001)
    assert found[2].undefined_draws == 0
    whole = cluster_robust([0.2, 0.9] * 4, [0, 1] * 4)
    assert (found[0].low, found[0].high) == pytest.approx((whole.low, whole.high)), 'no draw is in a t-interval'
    assert found[1].low < found[1].mean < found[1].high
    draws = np.linspace(0, 1, 1000)
    draws[:25] = nan
    assert percentile_interval(draws, 100, level=0.95)[0] is not None
    draws[25] = nan
    assert percentile_interval(draws, 100, level=0.95) == (None, None)


def test_a_gap_is_over_the_examples_that_all_arms_have_in_some_seed():
    random = np.random.default_rng(0)
    initial = random.uniform(size=30)
    arms = {'arm': initial + random.normal(0.1, 0.1, (2, 30)), 'oracle': initial + random.normal(0.3, 0.1, (2, 30))}
    arms['arm'][0, 3] = arms['oracle'][1, 7] = np.nan
    arms['oracle'][:, 5] = initial[11] = np.nan
    kept = [i for i in range(30) if i not in (5, 11)]
    means = {
        name: np.array([mean([x for x in of if x == x]) for of in values.T[kept]]) for name, values in arms.items()
    }
    found = gaps_recovered(arms, initial, 'oracle', range(30), resamples=50)['arm']
    once = gaps_recovered(means, initial[kept], 'oracle', kept, resamples=50)['arm']
    assert (found.mean, found.low, found.high) == pytest.approx((once.mean, once.low, once.high))
    assert (found.num_examples, found.reason) == (28, None)
    arms['arm'][:, :] = np.nan
    none = gaps_recovered(arms, initial, 'oracle', range(30), resamples=50)
    assert {(x.mean, x.reason) for x in none.values()} == {(None, 'none of 30 examples has a score of all arms')}


def test_transfer_is_over_the_conversations_of_both_assistants():
    met = {
        'initial': {'one': np.array([0.5, np.nan, 0.1, 0.2])},
        'one/seed-0': {'one': np.array([0.9, 0.9, np.nan, 0.4])},
    }
    runs, arms = {'one': {0: 'one/seed-0'}}, {'one': Arm('x')}
    assert transfers(runs, arms, {'one': 'one'}, met)['one'].simulators['one'].mean == pytest.approx(0.3)
    met['one/seed-0']['one'][[0, 3]] = np.nan
    with pytest.raises(ValueError, match='expected an example with an outcome of both, found none among 4'):
        transfers(runs, arms, {'one': 'one'}, met)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'score': [0.5, 0.5, None]}, "a 'score' of example 'person-1' if and only .*, found 0.5 with the cause 'a "),
        (
            {'score': [0.5, None, float('nan')]},
            "'score' of example 'person-2' if and only .*, found nan with the cause ''",
        ),
        (
            {'end': ['turns', None, None]},
            "'end' of example 'person-2' if and only .*, found None with the cause ''",
        ),
        ({'cause': ['x', 'x', 'x']}, "outcomes of 'a': expected an example with an outcome, found none"),
    ],
)
def test_a_missing_value_has_a_cause_and_what_has_a_cause_has_no_value(changes, message):
    good = columns([0.5, None, 0.25])
    assert outcomes_of('a', good).judged.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=message):
        outcomes_of('a', good | changes)


def test_missing_values_are_refused_unless_they_are_expected():
    for function in (cluster_bootstraps, cluster_shares):
        with pytest.raises(ValueError, match='expected finite values, found nan'):
            function([[0.5, float('nan')]], range(2))
        with pytest.raises(ValueError, match='expected finite values, found inf'):
            function([[0.5, float('inf')]], range(2), nan='missing')
        with pytest.raises(ValueError, match='expected a value in each measure, found one whose values are all'):
            function([[0.5, 0.5], [float('nan')] * 2], range(2), nan='missing')
    with pytest.raises(ValueError, match=r"outcomes of 'a/seed-0': expected an example with one of 'initial' too"):
        compare(outcomes(initial=[0.5, None], a_0=[None, 0.5]))


def test_without_failures_masks_change_no_bit():
    """Means over selected values are those over all."""
    random = np.random.default_rng(0)
    found = outcomes(initial=random.uniform(size=301), a_0=random.uniform(size=301), b_0=random.uniform(size=301))
    result = summarise(found, compare(found, vote), resamples=20)
    for name, x in found.items():
        assert result[name].score.mean == float(x.score.mean())
        assert result[name].causes == {}
    compared = {name: dataclasses.astuple(x) for name, x in compare(found, vote).items()}
    arms, (difference,) = compared_arms(found, resamples=20)
    assert arms['a'].gain.values == (float(compared['a/seed-0'][0].mean()),)
    assert (arms['a'].compared, difference.compared) == ((301,), (301,))
    assert (arms['a'].win_rate_bounds, result['a/seed-0'].win_rate_bounds) == (None, None)
    assert difference.score.values == (float((found['b/seed-0'].score - found['a/seed-0'].score).mean()),)
