"""An interval over seeds and people at once: parity with the analysis of variance, and coverage where others fail."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.regression.linear_model import OLS

from simrl.evaluation.blocks import block_spread
from simrl.evaluation.crossed import crossed_mean
from simrl.evaluation.seeds import t_interval
from simrl.evaluation.statistics import cluster_bootstraps

NAN = float('nan')
SHAPES = st.tuples(st.integers(2, 5), st.integers(2, 8), st.integers(0, 2**16))


def scores(seeds, people, number, of_seed=0.5, of_person=1.0):
    random = np.random.default_rng(number)
    shape = (seeds, people)
    return of_seed * random.normal(size=(seeds, 1)) + of_person * random.normal(size=people) + random.normal(size=shape)


@settings(max_examples=20, deadline=None)
@given(SHAPES)
def test_the_parts_are_those_of_the_analysis_of_variance(shape):
    values = scores(*shape)
    seeds, people = values.shape
    seed, person = np.indices(values.shape).reshape(2, -1, 1)
    effects = {'seed': seed == range(seeds), 'person': person == range(people)}
    both = OLS(values.ravel(), np.hstack([*effects.values()]).astype(float)).fit()
    only = {name: OLS(values.ravel(), x.astype(float)).fit() for name, x in effects.items()}
    of_seeds = (only['person'].ssr - both.ssr) / (seeds - 1)
    of_people = (only['seed'].ssr - both.ssr) / (people - 1)
    estimate = crossed_mean(values, range(people))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.from_seeds == pytest.approx(of_seeds / values.size)
    expected = max(0, of_people - both.mse_resid) / values.size
    assert estimate.from_people == pytest.approx(expected, abs=1e-12)
    assert (estimate.num_seeds, estimate.num_people) == values.shape


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.floats(-5, 5), st.floats(0.1, 10), st.randoms())
def test_neither_order_nor_shift_nor_unit_nor_names_matter(shape, shift, unit, random):
    values = scores(*shape)
    seeds, people = values.shape
    before = crossed_mean(values, range(people))
    order = random.sample(range(people), people)
    moved = (shift + unit * values)[random.sample(range(seeds), seeds)][:, order]
    after = crossed_mean(moved, [f'person {k}' for k in order])
    assert (after.mean, after.low, after.high) == pytest.approx(
        tuple(shift + unit * x for x in (before.mean, before.low, before.high))
    )
    assert before.low <= before.mean <= before.high


def test_the_limits_are_an_interval_over_seeds_and_one_over_people():
    random = np.random.default_rng(0)
    runs = random.normal(size=(4, 1))
    found = crossed_mean(runs + 1e-4 * random.normal(size=50), range(50))
    alone = t_interval(runs.ravel())
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=1e-3), 'people are all but alike'
    people = random.normal(size=400)
    found = crossed_mean(people + 1e-4 * random.normal(size=(4, 1)), range(400))
    (alone,) = cluster_bootstraps([people], range(400))
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.03), 'seeds are all but alike'


def test_observations_of_one_person_stay_together():
    """Of equal numbers they are one observation, the mean; the same observation again tells nothing new."""
    values = scores(3, 24, 1)
    person = np.repeat(np.arange(8), 3).tolist()
    found, means = crossed_mean(values, person), crossed_mean(values.reshape(3, 8, 3).mean(2), range(8))
    assert (found.low, found.high, found.num_people) == pytest.approx((means.low, means.high, 8))
    twice = crossed_mean(np.repeat(values, 2, axis=1), np.repeat(np.arange(24), 2).tolist())
    once = crossed_mean(values, range(24))
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    uneven = crossed_mean(values, [0] * 10 + list(range(1, 15)))
    assert uneven.mean == pytest.approx(values.mean()), 'of observations, however they come'
    assert uneven.num_people == 15


def uneven(random, seeds, sizes, of_seed, lost=0.0):
    """Scores of people with several observations each, which share a person's effect; some are lost in a seed."""
    person = np.repeat(np.arange(len(sizes)), sizes)
    own = random.normal(size=len(sizes)) + 0.8 * random.normal(size=(seeds, len(sizes)))
    values = of_seed * random.normal(size=(seeds, 1)) + own[:, person] + random.normal(size=(seeds, len(person)))
    return np.where(random.random(values.shape) < lost, NAN, values), person.tolist()


def test_what_seeds_differ_in_is_no_part_of_people_of_several_sizes():
    random = np.random.default_rng(3)
    values, person = uneven(random, 4, random.integers(1, 9, 20), of_seed=0.0)
    before = crossed_mean(values, person)
    after = crossed_mean(values + np.array([[5.0], [-2.0], [0.5], [-3.5]]), person)
    assert after.from_people == pytest.approx(before.from_people)
    assert after.from_seeds > 100 * before.from_seeds


def slow_parts(values, person):
    """Person by person and seed by seed: the parts of the mean's variance of people of several sizes."""
    seeds, people, number = len(values), sorted(set(person)), len(person)
    mean = sum(map(sum, values)) / (seeds * number)
    by_seed = [sum(row) / number for row in values]
    deviation = {
        (s, c): sum(x - mean for x, who in zip(row, person, strict=True) if who == c)
        for s, row in enumerate(values)
        for c in people
    }
    of_person = {c: sum(deviation[s, c] for s in range(seeds)) / seeds for c in people}
    size = {c: person.count(c) for c in people}
    residual = sum(
        (deviation[s, c] - of_person[c] - size[c] * (by_seed[s] - mean)) ** 2 for s in range(seeds) for c in people
    )
    squares = seeds * sum(x**2 for x in of_person.values()) / (len(people) - 1)
    each = len(people) / number  # the mean size is its inverse
    squares, residual = squares * each**2, residual * each**2 / ((seeds - 1) * (len(people) - 1))
    from_seeds = sum((x - mean) ** 2 for x in by_seed) / (seeds - 1) / seeds
    return from_seeds, max(0.0, squares - residual) / (seeds * len(people))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.lists(st.integers(1, 4), min_size=2, max_size=7), st.integers(0, 2**16))
def test_the_parts_of_people_of_several_sizes_are_those_of_a_slow_loop(seeds, sizes, number):
    values, person = uneven(np.random.default_rng(number), seeds, sizes, of_seed=1.0)
    found = crossed_mean(values, person)
    assert (found.from_seeds, found.from_people) == pytest.approx(slow_parts(values.tolist(), person), abs=1e-12)


@pytest.mark.parametrize('lost', [0.0, 0.1])
def test_covers_people_of_several_sizes_also_where_a_tenth_is_lost(lost):
    """600 experiments; what a seed lacks is left out of all. The parts add up to the variance that the means have."""
    random, estimates = np.random.default_rng(4), []
    sizes = random.integers(1, 9, 60)
    for _ in range(600):
        values, person = uneven(random, 4, sizes, of_seed=0.4, lost=lost)
        estimates.append(crossed_mean(values, person, nan='missing'))
        assert estimates[-1].left_out == int(np.isnan(values).any(axis=0).sum())
        assert estimates[-1].num_observations + estimates[-1].left_out == len(person)
    assert np.mean([x.low <= 0 <= x.high for x in estimates]) == pytest.approx(0.95, abs=0.03)
    expected = np.mean([x.from_seeds + x.from_people for x in estimates])
    assert np.var([x.mean for x in estimates]) == pytest.approx(expected, rel=0.15)


def test_a_difference_is_paired_by_seed_and_person():
    common = scores(3, 40, 2, of_seed=3.0, of_person=3.0)
    first, second = common + 0.2 + 0.1 * scores(3, 40, 3), common + 0.1 * scores(3, 40, 4)
    found, other = (crossed_mean(x, range(40)) for x in (first - second, second - first))
    assert (found.low, found.high) == pytest.approx((-other.high, -other.low))
    alone = crossed_mean(first, range(40))
    assert found.high - found.low < (alone.high - alone.low) / 5


def test_a_pooled_spread_stands_for_that_of_the_seeds():
    """Two seeds that happen to agree have the spread of the other arms, and its degrees of freedom."""
    arms = np.stack([scores(2, 30, number) for number in range(6)])
    spread = block_spread(arms.mean(axis=2)).run
    alone, pooled = crossed_mean(arms[0], range(30)), crossed_mean(arms[0], range(30), spread=spread)
    assert pooled.from_seeds == spread.variance / 2
    assert pooled.from_people == alone.from_people
    agreeing = arms[0] - arms[0].mean(axis=1, keepdims=True)
    assert crossed_mean(agreeing, range(30)).low is None
    assert crossed_mean(agreeing, range(30), spread=spread).low < 0


def test_an_observation_that_one_seed_lacks_is_left_out_of_all():
    values = scores(3, 12, 5)
    lost = values.copy()
    lost[0, 3] = lost[2, 7] = NAN
    kept = [i for i in range(12) if i not in (3, 7)]
    found = crossed_mean(lost, range(12), nan='missing')
    assert (found.num_observations, found.left_out) == (10, 2)
    assert dataclasses.replace(found, left_out=0) == crossed_mean(values[:, kept], kept)


@pytest.mark.parametrize(
    'values',
    [
        [[0.5, 0.7, 0.2]],  # one seed
        [[0.5], [0.7]],  # one person
        [[0.1, 0.5], [0.5, 0.1]],  # neither seeds nor people differ
        [[0.1, 0.2, 0.6], [0.6, 0.2, 0.1]],  # seeds do not
        [[0.1 + 0.2, 0.3], [0.5, 0.5]],  # people do not, but for rounding
        [[0.4, 0.4], [0.4, 0.4]],
    ],
)
def test_where_seeds_or_people_do_not_differ_there_is_no_interval(values):
    found = crossed_mean(values, range(len(values[0])))
    assert (found.low, found.high, found.sign, found.from_seeds, found.from_people) == (None,) * 5
    assert found.mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: crossed_mean([], []), 'crossed_mean: expected at least one seed, found none'),
        (lambda: crossed_mean([[]], []), 'crossed_mean: expected at least one observation, found none'),
        (lambda: crossed_mean([[0.5, 0.1]], [0]), r'expected 1 values of each measure, found \[1, 2\]'),
        (lambda: crossed_mean([[0.5, NAN], [0.1, 0.2]], [0, 1]), 'crossed_mean: expected finite values, found nan'),
        (
            lambda: crossed_mean([[0.5, NAN], [NAN, 0.2]], [0, 1], nan='missing'),
            'expected an observation of all seeds, found none among 2',
        ),
        (lambda: crossed_mean([[0.5, 0.1]], [0, 1], level=95), r'expected a level in \(0, 1\), found 95'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def coverage(seeds, people, share, *, studies, arms=1):
    """The share of experiments whose interval covers the truth: over both, over seeds alone, over people alone.

    `share` of the mean's variance is from seeds. With several arms, whose seeds' spreads go from half to twice the
    first's, the last interval is of a pooled spread.
    """
    random = np.random.default_rng((seeds, people, round(100 * share), arms))
    sds = 2.0 ** np.concatenate([[0.0], np.linspace(-1, 1, arms - 1)])[:, None, None]
    sds = sds * np.sqrt(share * seeds)
    found = []
    for _ in range(studies):
        of_person = random.normal(0, np.sqrt((1 - share) * people), people)
        runs = sds * random.normal(size=(arms, seeds, 1))
        values = runs + of_person + random.normal(0, np.sqrt(0.1 * people), (arms, seeds, people))
        one, means = values[0], values.mean(axis=2)
        spread = block_spread(means).run if arms > 1 else None
        crossed = crossed_mean(one, range(people), spread=spread)
        estimates = (crossed, t_interval(means[0]), t_interval(one.mean(axis=0)))
        found.append([x.low <= 0 <= x.high for x in estimates])
    return np.mean(found, axis=0)


def check_coverage(seeds, people, share, studies, arms=1):
    both, over_seeds, over_people = coverage(seeds, people, share, studies=studies, arms=arms)
    noise = 3 * np.sqrt(0.95 * 0.05 / studies)
    assert 0.94 - noise <= both <= 0.98 + noise
    if share == 0.5:
        assert over_people < 0.90 + noise, 'people alone leave out other training seeds'
        assert over_seeds < 0.94 + noise, 'seeds alone leave out other people'


@pytest.mark.parametrize(('seeds', 'people', 'share', 'arms'), [(2, 30, 0.5, 1), (3, 30, 0.9, 5), (8, 30, 0.1, 1)])
def test_covers_over_seeds_and_people_at_once(seeds, people, share, arms):
    check_coverage(seeds, people, share, 150, arms)


@pytest.mark.long
@pytest.mark.parametrize('seeds', [2, 3, 5, 8])
@pytest.mark.parametrize(('share', 'arms'), [(0.1, 1), (0.5, 1), (0.5, 5), (0.9, 1)])
def test_covers_in_two_thousand_experiments_of_283_people(seeds, share, arms):
    check_coverage(seeds, 283, share, 2000, arms)
