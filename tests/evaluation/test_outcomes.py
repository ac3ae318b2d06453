"""Outcomes on the same examples with every assistant: by hand, against known effects, and bad input."""

import numpy as np
import pytest

from simrl.evaluation.gap_recovered import gaps_recovered
from simrl.evaluation.outcomes import compare, outcomes_of, panel_votes, summarise, with_common_parts
from tests.evaluation.made_up import columns, outcomes, vote


def test_two_people_by_hand():
    found = {
        'initial': outcomes_of(
            'initial',
            columns(
                [0.5, 0.75],
                end=['accepted', 'left'],
                first_act=['ask', 'propose'],
                truncated=[0, 1],
                user_truncated=[0, 2],
            ),
        ),
        'oracle/seed-0': outcomes_of(
            'oracle/seed-0', columns([0.75, 0.75], end=['accepted', 'turns'], assistant_turns=[2, 4])
        ),
    }
    result = summarise(found, compare(found, vote), resamples=100)
    initial, oracle = result['initial'], result['oracle/seed-0']
    assert initial.ends == {'accepted': 0.5, 'left': 0.5, 'turns': 0.0}
    assert initial.labels == {'first_act': {'ask': 0.5, 'propose': 0.5}}
    assert oracle.labels == {'first_act': {'ask': 1.0, 'propose': 0.0}}, 'a label that nobody has is a 0, not absent'
    assert (initial.truncated, oracle.truncated) == (0.25, 0.0)
    assert (initial.user_truncated, oracle.user_truncated) == (0.5, 0.0), 'conversations, not messages'
    assert (initial.assistant_turns, oracle.assistant_turns) == (2.0, 3.0)
    assert (initial.gain, initial.win_rate, initial.strict_win_rate) == (None, None, None)
    assert oracle.gain.mean == pytest.approx(0.125)
    assert oracle.win_rate.mean == pytest.approx((0.9 + 0.5) / 2), 'a quarter more is preferred nine times in ten'
    assert oracle.strict_win_rate.mean == 0.75
    assert oracle.parts['share_met'].mean == 0.75
    assert oracle.gain.num_clusters == 2


def test_lengths_are_of_messages_and_beside_the_score():
    longer = columns(
        [0.1, 0.2, 0.2, None],
        assistant_turns=[1, 2, 3, None],
        assistant_tokens=[4, 10, 16, None],
        user_truncated=[0, 1, 2, None],
    )
    found = {'initial': outcomes_of('initial', columns([0, 1, 1, 1])), 'a/seed-0': outcomes_of('a/seed-0', longer)}
    result = summarise(found, compare(found), resamples=50)
    assert result['a/seed-0'].message_tokens == 5.0
    assert result['a/seed-0'].user_truncated == 2 / 3, 'of conversations with an outcome'
    assert result['a/seed-0'].length_correlation == pytest.approx(1.5 / 3**0.5), 'ranks 1, 2½, 2½ beside 1, 2, 3'
    earlier = result['initial']
    assert (earlier.message_tokens, earlier.length_correlation) == (None, None), 'not known of an earlier version'
    assert list(result['a/seed-0'].parts) == ['share_met'], 'it is no part of the score'


def test_a_panels_judges_are_worth_their_votes_over_all_assistants():
    scores = np.random.default_rng(0).random((3, 2, 40))

    def of(assistant, more):
        own = columns([*scores[:2, assistant].mean(0), None])
        return own | {f'judge_{k}': [*scores[x, assistant], None] for k, x in more.items()}

    def votes(more):
        return panel_votes([outcomes_of(name, of(k, more)) for k, name in enumerate(('initial', 'a/seed-0'))])

    found = votes({'a': 0, 'b': 1})
    assert found.mean_correlation == pytest.approx(np.corrcoef(scores[:2].reshape(2, -1))[0, 1])
    assert found.effective == pytest.approx(2 / (1 + found.mean_correlation))
    assert found.low < found.effective < found.high
    assert votes({'a': 0, 'b': 0}).effective == pytest.approx(1)
    assert votes({'a': 0}) is None
    same = [*np.full(40, 0.7), None]
    alike = [outcomes_of(str(k), of(k, {'a': 0}) | {'judge_b': same}) for k in (0, 1)]
    assert panel_votes(alike) is None, 'a judge who never differs'
    one, both = (outcomes_of(str(k), of(k, more)) for k, more in enumerate(({'a': 0}, {'a': 0, 'b': 1})))
    assert panel_votes([one, both]) is None, 'a stage of an earlier version has fewer parts'
    kept = with_common_parts({'initial': both, 'a/seed-0': one})
    assert [list(found.parts) for found in kept.values()] == [['share_met', 'judge_a']] * 2


def test_a_higher_score_wins_where_nothing_else_is_said_and_there_is_no_second_win_rate():
    found = outcomes(initial=[0.1, 0.2, 0.3, 0.4], a_0=[0.2, 0.2, 0.2, 0.5])
    result = summarise(found, compare(found), resamples=50)['a/seed-0']
    assert (result.win_rate.mean, result.strict_win_rate) == ((1 + 0.5 + 0 + 1) / 4, None)


def test_examples_of_one_cluster_stay_together():
    twice = {'cluster': ['a', 'a', 'b', 'b']}
    found = {name: outcomes_of(name, columns([0, 0, 1, 1], **twice)) for name in ('initial', 'x/seed-0')}
    score = summarise(found, compare(found), resamples=200)['initial'].score
    assert (score.num_observations, score.num_clusters) == (4, 2)
    half = 12.7062 / 2  # Student's t of one degree of freedom, and two people half apart
    assert (score.low, score.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


def test_the_gap_recovered_covers_the_truth():
    """200 populations of 100 people: an arm that recovers 0.6 of a gain of 0.3, through noise that people share."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        person = random.normal(0.4, 0.3, 100)
        initial, arm, oracle = (person + gain + random.normal(0, 0.2, (4, 100)) for gain in (0.0, 0.18, 0.3))
        arms = {'arm': arm, 'oracle': oracle}
        share = gaps_recovered(arms, initial[0], 'oracle', range(100), resamples=300, seed=seed)['arm']
        covered += share.low <= 0.6 <= share.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_gap_recovered_of_the_ends_of_its_scale_and_beyond():
    initial = np.array([0.0, 0.4, 0.2, 0.1])
    oracle = initial + np.array([0.2, 0.4, 0.3, 0.3])
    arms = {'none': initial, 'equal': oracle, 'more': initial + 1.5 * (oracle - initial), 'oracle': oracle}
    shares = gaps_recovered(arms, initial, 'oracle', range(4))
    assert [(share.mean, share.low, share.high) for share in shares.values()] == [
        (0.0, None, None),
        (1.0, None, None),
        (pytest.approx(1.5), None, None),
        (1.0, None, None),
    ]
    assert [share.reason is None for share in shares.values()] == [False, False, False, True], 'why no interval'


def test_a_share_of_few_people_has_no_interval_and_says_so():
    initial = np.array([0.1, 0.4, 0.2, 0.3, 0.2])
    gains = {'arm': [0.1, 0.12, 0.08, 0.1, 0.11], 'oracle': [0.2, 0.3, 0.25, 0.2, 0.3]}
    arms = {name: initial + np.array(gain) for name, gain in gains.items()}
    share = gaps_recovered(arms, initial, 'oracle', range(5))['arm']
    assert (share.mean, share.low) == (pytest.approx(0.51 / 1.25), None)
    assert share.reason == 'an interval of a share needs 6 clusters of examples, there are 5'
    arms = {name: np.tile(x, 2) for name, x in arms.items()}
    share = gaps_recovered(arms, np.tile(initial, 2), 'oracle', range(10))['arm']
    assert share.low < share.mean < share.high
    assert share.undefined_draws == 0


def test_no_share_of_a_gain_that_may_be_none_of_other_seeds():
    """Many people are sure of each checkpoint, but the seeds of the oracle disagree."""
    initial = np.linspace(0.1, 0.5, 400)
    arms = {'arm': initial + 0.1, 'oracle': np.stack([initial + 0.5, initial + 0.01])}
    share = gaps_recovered(arms, initial, 'oracle', range(400), resamples=200)['arm']
    assert share.mean is None
    assert "the oracle's gain +0.255" in share.reason
    assert 'over training seeds is not above 0' in share.reason


def test_no_share_of_a_gain_without_an_interval():
    """Of one person nothing is known of others; from two seeds on, that of other seeds is."""
    one = gaps_recovered({'arm': np.array([0.5]), 'oracle': np.array([0.9])}, np.array([0.1]), 'oracle', ['p'])['arm']
    assert (one.mean, one.low, one.high) == (None, None, None)
    assert one.reason == "the oracle's gain +0.800 has no interval: one example, or all are alike"
    arms = {'arm': np.array([[0.5], [0.5]]), 'oracle': np.array([[0.9], [0.92]])}
    several = gaps_recovered(arms, np.array([0.1]), 'oracle', ['p'])['arm']
    assert (several.mean, several.low, several.high) == (pytest.approx(0.4 / 0.81), None, None)
    assert several.reason == 'an interval of a share needs 6 clusters of examples, there are 1'
    arms = {name: np.repeat(x, 6, axis=1) for name, x in arms.items()}
    alike = gaps_recovered(arms, np.full(6, 0.1), 'oracle', range(6))['arm']
    assert (alike.low, alike.reason) == (None, 'the share is the same whichever examples are drawn')


@pytest.mark.parametrize('gain', [0.0, -0.5])
def test_no_share_of_a_gain_that_may_be_none(gain):
    random = np.random.default_rng(1)
    initial = random.uniform(size=40)
    oracle = initial + gain + random.normal(0, 0.3, 40)
    share = gaps_recovered({'arm': initial + 0.1, 'oracle': oracle}, initial, 'oracle', range(40))['arm']
    assert (share.mean, share.low, share.high) == (None, None, None)
    assert "the oracle's gain" in share.reason
    assert 'is not above 0' in share.reason
    with pytest.raises(ValueError, match="gaps_recovered: expected the oracle among the arms arm, found 'oracle'"):
        gaps_recovered({'arm': initial}, initial, 'oracle', range(40))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: outcomes_of('initial', columns([])), "'initial': expected columns of one length, at least 1, found"),
        (lambda: outcomes_of('x', columns([0.5], end=[])), "'x': expected columns of one length, at least 1, found"),
        (
            lambda: outcomes_of('x', {'score': [1.0]}),
            r"outcomes of 'x': expected a column 'example', found \['score'\]",
        ),
        (lambda: compare(outcomes(oracle_0=[0.1])), "expected 'initial' among the assistants, found oracle/seed-0"),
        (
            lambda: compare({'initial': outcomes_of('initial', columns([0.5, 0.1, 0.2], example=['p', 'q', 'p']))}),
            "outcomes of 'initial': expected each example once, found 'p' 2 times",
        ),
        (
            lambda: compare(outcomes(initial=[0.1]) | {'x': outcomes_of('x', columns([1], cluster=['p']))}),
            "'x': expected the cluster 'person-0' of example 'person-0', as with 'initial', found 'p'",
        ),
        (
            lambda: compare(outcomes(initial=[0.1], oracle_0=[0.1, 0.2])),
            "'oracle/seed-0': expected the 1 examples of 'initial' in their order, found 2, 1 of them the same",
        ),
        (
            lambda: gaps_recovered({'arm': np.zeros((2, 3))}, np.zeros(4), 'arm', range(4)),
            "expected 4 examples of 'arm', found 3",
        ),
        (lambda: gaps_recovered({}, np.zeros(0), 'arm', []), 'expected at least one example'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
