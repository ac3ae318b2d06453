"""A spread pooled over arms: the analysis of variance of textbooks and statsmodels, and its coverage, good and bad."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.regression.linear_model import OLS

from simrl.evaluation.blocks import block_spread, pooled_interval
from simrl.evaluation.seeds import t_interval

LAYOUTS = st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**16))


def layout(arms, seeds, number, missing=0):
    random = np.random.default_rng(number)
    values = random.normal(size=(arms, seeds)) + random.normal(size=seeds)
    values.ravel()[random.permutation(values.size)[:missing]] = np.nan
    return values


def analysis_of_variance(values):
    """The residual's mean square and degrees of freedom by statsmodels."""
    arm, seed = np.nonzero(~np.isnan(values))
    effects = [arm[:, None] == range(values.shape[0]), seed[:, None] == range(values.shape[1])]
    residual = OLS(values[arm, seed], np.hstack(effects).astype(float)).fit()
    return residual.ssr / residual.df_resid, residual.df_resid


@settings(max_examples=20, deadline=None)
@given(LAYOUTS, st.integers(0, 3))
def test_the_residual_is_that_of_statsmodels_also_where_runs_are_missing(shape, missing):
    values = layout(*shape, missing=missing)
    values[:2, :2] = 1.0, 3.0  # two arms share two seeds
    values[0, 0] = 0.5
    spread = block_spread(values).difference
    assert (spread.variance / 2, spread.df) == pytest.approx(analysis_of_variance(values))


@settings(max_examples=40, deadline=None)
@given(LAYOUTS)
def test_a_complete_layout_has_the_formulas_of_textbooks(shape):
    values = layout(*shape)
    arms, seeds = values.shape
    residual = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    residual_ms = (residual**2).sum() / ((arms - 1) * (seeds - 1))
    seeds_ms = arms * values.mean(0).var(ddof=1)
    spread = block_spread(values)
    assert (spread.difference.variance, spread.difference.df) == pytest.approx(
        (2 * residual_ms, (arms - 1) * (seeds - 1))
    )
    assert spread.run.variance == pytest.approx(values.var(1, ddof=1).mean())
    satterthwaite = (seeds_ms + (arms - 1) * residual_ms) ** 2 / (seeds_ms**2 + (arms - 1) * residual_ms**2)
    assert spread.run.df == pytest.approx(satterthwaite * (seeds - 1))
    assert seeds - 1 - 1e-9 <= spread.run.df <= arms * (seeds - 1) + 1e-9


@settings(max_examples=40, deadline=None)
@given(LAYOUTS, st.floats(-5, 5), st.floats(0.1, 10), st.randoms())
def test_neither_order_nor_shift_nor_unit_matters(shape, shift, unit, random):
    values = layout(*shape)
    before = block_spread(values)
    shuffled = values[random.sample(range(len(values)), len(values))]
    shuffled = shuffled[:, random.sample(range(values.shape[1]), values.shape[1])]
    after = block_spread(shift + unit * shuffled)
    for one, other in ((before.run, after.run), (before.difference, after.difference)):
        assert (other.variance, other.df) == pytest.approx((unit**2 * one.variance, one.df))
    interval, other = (pooled_interval(x, s.run) for x, s in ((values[0], before), (shift + unit * values[0], after)))
    assert (other.low, other.high) == pytest.approx((shift + unit * interval.low, shift + unit * interval.high))
    assert other.alone == pytest.approx(tuple(shift + unit * x for x in interval.alone))


def test_two_arms_have_their_own_difference():
    """With two arms nothing is pooled: the interval of their difference is that of `t_interval`."""
    values = layout(2, 4, 0)
    pooled = pooled_interval(values[0] - values[1], block_spread(values).difference, null=0.0)
    alone = t_interval(values[0] - values[1], null=0.0)
    assert (pooled.low, pooled.high) == pytest.approx((alone.low, alone.high)) == pooled.alone
    assert (pooled.mean, pooled.p_value, pooled.df) == (alone.mean, alone.p_value, 3)


def test_two_seeds_of_five_arms_have_an_interval_worth_having():
    """Satisfactions of two seeds near .47 alone have [-.26, 1.21]: five arms that spread alike bring it to a tenth."""
    values = np.array([[0.412, 0.528], [0.55, 0.47], [0.60, 0.66], [0.63, 0.55], [0.70, 0.78]])
    spread = block_spread(values)
    interval = pooled_interval(values[0], spread.run)
    assert interval.alone == pytest.approx((-0.267, 1.207), abs=1e-3)
    assert interval.high - interval.low < (interval.alone[1] - interval.alone[0]) / 6
    assert 1 < spread.run.df < 5


def test_where_nothing_can_be_told_there_is_no_interval():
    nan = float('nan')
    for values in ([[1.0, 2.0]], [[1.0], [2.0]], [[1.0, nan], [nan, 2.0]], [[1.0, 2.0], [3.0, nan]], [[nan, nan]]):
        assert block_spread(values) is None
    alike = block_spread([[0.3, 0.3], [0.1 + 0.2, 0.3]])
    assert (alike.run, alike.difference) == (None, None)
    parallel = block_spread([[0.1, 0.2, 0.4], [0.4, 0.5, 0.7]])  # but for rounding
    assert parallel.difference is None, 'arms that differ by the same in every seed'
    assert parallel.run.df == pytest.approx(2), 'all of the spread is shared: as if there were one arm'
    spread = block_spread(layout(3, 3, 0)).run
    one = pooled_interval([0.7], spread)
    assert (one.mean, one.low, one.alone, one.df) == (0.7, None, None, None)
    same = pooled_interval([0.7, 0.7], spread)
    assert same.alone is None
    assert same.low < 0.7 < same.high, 'two runs that agree by chance have the spread of the others'
    assert pooled_interval([0.5, 0.7], None) == t_interval([0.5, 0.7])
    with pytest.raises(ValueError, match=r'block_spread: expected finite or missing values \[arms, seeds\], found'):
        block_spread([[1.0, float('inf')], [0.0, 0.0]])
    with pytest.raises(ValueError, match=r'block_spread: expected the same seeds of all arms, found \[2, 1\]'):
        block_spread([[1.0, 2.0], [0.0]])
    with pytest.raises(ValueError, match='t_interval: expected finite values, found nan'):
        pooled_interval([0.5, nan], spread)


def coverage(sds, seeds, *, shared=0.5, studies=300):
    """The share of experiments whose interval covers the truth: by arm, of t alone, by pair of arms."""
    random = np.random.default_rng(seeds)
    arms, pairs = len(sds), [(i, j) for i in range(len(sds)) for j in range(i)]
    runs, alone, differences = [], [], []
    for _ in range(studies):
        values = random.normal(size=(arms, seeds)) * np.array(sds)[:, None] + shared * random.normal(size=seeds)
        spread = block_spread(values)
        found = [pooled_interval(of_arm, spread.run) for of_arm in values]
        runs.append([x.low <= 0 <= x.high for x in found])
        alone.append([x.alone[0] <= 0 <= x.alone[1] for x in found])
        of_pairs = [pooled_interval(values[i] - values[j], spread.difference) for i, j in pairs]
        differences.append([x.low <= 0 <= x.high for x in of_pairs])
    return np.mean(runs, 0), np.mean(alone), np.mean(differences, 0)


EQUAL, DOUBLE, WIDE = (1.0,) * 5, (1.0, 1.0, 1.4, 1.4, 2.0), (1.0, 1.0, 1.0, 1.0, 3.0)


def check_coverage(sds, seeds, studies):
    """Nominal where arms spread alike; else about so on average over arms, too little for the widest one."""
    runs, alone, differences = coverage(sds, seeds, studies=studies)
    noise = 3 * np.sqrt(0.95 * 0.05 / studies)  # of one arm; of many it is less
    assert alone == pytest.approx(0.95, abs=noise)
    if sds == EQUAL:
        assert runs == pytest.approx([0.95] * 5, abs=0.01 + noise)
        assert differences == pytest.approx([0.95] * 10, abs=0.01 + noise)
        return
    assert runs.mean() == pytest.approx(0.95, abs=0.02 + noise)
    assert differences.mean() == pytest.approx(0.94, abs=0.02 + noise)
    least = 0.85 if sds == DOUBLE else 0.75
    assert least - 0.03 - noise < runs[-1] < least + 0.08 + noise, 'the widest arm'


@pytest.mark.parametrize(('sds', 'seeds'), [(EQUAL, 2), (EQUAL, 3), (DOUBLE, 2), (WIDE, 3)])
def test_covers_where_arms_spread_alike_and_on_average_where_they_do_not(sds, seeds):
    check_coverage(sds, seeds, 150)


@pytest.mark.long
@pytest.mark.parametrize('seeds', [2, 3, 5, 8])
@pytest.mark.parametrize('sds', [EQUAL, DOUBLE, WIDE])
def test_covers_in_two_thousand_experiments(sds, seeds):
    check_coverage(sds, seeds, 2000)
