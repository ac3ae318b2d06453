"""The stages in which models talk: what is refused beforehand, and what is reported."""

from simrl.experiments import arms


def test_a_metric_of_a_run_is_the_mean_over_its_steps_not_over_its_lines():
    lines = [{'step': 4, 'share': 0.5}, {'step': 8, 'share': 0.25}, {'step': 9, 'share': 1.0}]
    assert arms.mean_over_steps(lines, 'share') == (4 * 0.5 + 4 * 0.25 + 1.0) / 9
