"""Holm's correction as statsmodels and as the definition have it."""

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from simrl.evaluation.multiplicity import holm


def test_a_small_family():
    assert holm({'a': 0.01, 'b': 0.04, 'c': 0.03}) == pytest.approx({'a': 0.03, 'b': 0.06, 'c': 0.06})
    assert list(holm({'b': 0.5, 'a': 0.01})) == ['b', 'a']
    assert holm({}) == {}


def test_as_statsmodels():
    """Of many p-values with ties, in one call: statsmodels collects garbage at each, which takes long."""
    p_values = np.random.default_rng(1).integers(0, 1001, 400) ** 3 / 1e9
    found = np.array(list(holm(dict(enumerate(p_values.tolist()))).values()))
    assert found == pytest.approx(multipletests(p_values, method='holm')[1])
    assert ((p_values <= found) & (found <= 1)).all()
    assert 0 < (found == 1).sum() < 400


def test_rejects_a_true_hypothesis_no_more_often_than_it_says():
    """Four true hypotheses beside one false one; 2,000 families have a standard error of half a point."""
    random = np.random.default_rng(0)
    families = np.concatenate([random.random((2000, 4)), random.random((2000, 1)) / 1000], axis=1)
    wrong = [min(list(holm(dict(enumerate(family))).values())[:4]) <= 0.05 for family in families.tolist()]
    assert 0.035 <= np.mean(wrong) <= 0.065
    assert (families[:, :4].min(1) <= 0.05).mean() > 0.15, 'without a correction'


@pytest.mark.parametrize('wrong', [-0.1, 1.1, float('nan')])
def test_bad_input(wrong):
    with pytest.raises(ValueError, match=r"holm: expected a p-value in \[0, 1\] of 'b', found"):
        holm({'a': 0.5, 'b': wrong})
