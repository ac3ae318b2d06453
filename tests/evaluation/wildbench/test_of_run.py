"""What a run keeps of WildBench's results: no interval goes on to means that there cannot be."""

import dataclasses

import pytest
import scipy.stats

from simrl.evaluation.wildbench import of_run
from simrl.evaluation.wildbench.means import mean_of


@pytest.mark.parametrize(
    ('values', 'ends'), [([0, 0, 0, 0.5, 0], 'low'), ([1, 1, 0.5, 1, 1], 'high'), ([0.4, 0.6, 0.5], '')]
)
def test_an_interval_ends_where_values_do(values: list[float], ends: str) -> None:
    share = dataclasses.asdict(mean_of(values))
    counts = {'all': 9, 'without a reply': 0, 'without a verdict': 9 - len(values)}
    (number,) = of_run.of_checklist({'tasks': counts, 'share': share, 'judges': {}}, 'mine')
    found = number.estimate
    assert found is not None
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, share['mean'], share['sem'])
    assert found.low == pytest.approx(0 if ends == 'low' else low)
    assert found.high == pytest.approx(1 if ends == 'high' else high)
    assert (low < 0) == (ends == 'low')
    assert (high > 1) == (ends == 'high')
