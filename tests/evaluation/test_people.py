"""What is said of the same people with every assistant: by hand, against known effects, and what is refused."""

import numpy as np
import pytest

from simrl.evaluation.gap_recovered import recovered_shares
from simrl.evaluation.people import compare, outcomes_of, split_name, summarise_people
from simrl.evaluation.results import ClaimsResult, PeopleResult
from simrl.run import config
from tests.evaluation.made_up import claims_of, outcomes, row, vote


def summarise(found, people, **options):
    return summarise_people(found, compare(found, vote=vote), people, **options)


def test_two_people_by_hand():
    found = {
        'initial': outcomes_of(
            'initial', [row(0.5), row(0.75, 'left', first_act='propose', truncated=1, user_truncated=2)]
        ),
        'oracle/seed-0': outcomes_of('oracle/seed-0', [row(0.75), row(0.75, 'turns', assistant_turns=4)]),
    }
    result = summarise(found, ['a', 'b'], dial=1.0, resamples=100)
    initial, oracle = result.assistants['initial'], result.assistants['oracle/seed-0']
    assert initial.ends == {'accepted': 0.5, 'left': 0.5, 'turns': 0.0}
    assert initial.first_acts == {'ask': 0.5, 'propose': 0.5}
    assert oracle.first_acts == {'ask': 1.0, 'propose': 0.0}, 'an act that nobody did is a 0, not absent'
    assert (initial.truncated, oracle.truncated) == (0.25, 0.0)
    assert (initial.user_truncated, oracle.user_truncated) == (0.5, 0.0), 'conversations, not messages'
    assert (initial.assistant_turns, oracle.assistant_turns) == (2.0, 3.0)
    assert (initial.gain, initial.win_rate, initial.strict_win_rate) == (None, None, None)
    assert oracle.gain.mean == pytest.approx(0.125)
    assert oracle.win_rate.mean == pytest.approx((0.9 + 0.5) / 2), 'a quarter more is preferred nine times in ten'
    assert oracle.strict_win_rate.mean == 0.75
    assert (result.world.people, oracle.gain.num_clusters) == (2, 2)


def test_before_any_arm_is_trained_nothing_is_claimed():
    found = outcomes(initial=[0.1, 0.2])
    claims = claims_of(found, 'ab', resamples=50)
    assert (claims.seeds, claims.arms, claims.differences, claims.transfers) == ((), {}, {}, {})
    assert list(summarise(found, 'ab', dial=1.0, resamples=50).assistants) == ['initial']


def test_results_survive_json():
    found = outcomes(initial=[0.1, 0.2, 0.3], oracle_0=[0.5, 0.6, 0.9], oracle_1=[0.4, 0.5, 0.9])
    people = summarise(found, 'abc', dial=0.5, resamples=50)
    claims = claims_of(found, 'abc', resamples=50)
    assert config.from_config_dict(PeopleResult, config.to_dict(people), 'people.json') == people
    assert config.from_config_dict(ClaimsResult, config.to_dict(claims), 'claims.json') == claims


def test_the_recovered_share_covers_the_truth():
    """200 populations of 100 people: an arm that recovers 0.6 of a gain of 0.3, through noise that people share."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        person = random.normal(0.4, 0.3, 100)
        initial, arm, oracle = (person + gain + random.normal(0, 0.2, (4, 100)) for gain in (0.0, 0.18, 0.3))
        share = recovered_shares({'arm': arm}, initial[0], oracle, range(100), resamples=300, seed=seed)['arm']
        covered += share.low <= 0.6 <= share.high
    assert 0.89 <= covered / 200 <= 0.99


def test_the_recovered_share_of_the_ends_of_its_scale_and_beyond():
    initial = np.array([0.0, 0.4, 0.2, 0.1])
    oracle = initial + np.array([0.2, 0.4, 0.3, 0.3])
    shares = recovered_shares(
        {'initial': initial, 'oracle': oracle, 'more': initial + 1.5 * (oracle - initial)}, initial, oracle, range(4)
    )
    assert [(share.mean, share.low, share.high) for share in shares.values()] == [
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.5)),
    ]


def test_no_share_of_a_gain_that_may_be_none_of_other_seeds():
    """Many people are sure of each checkpoint, but the seeds of the oracle disagree."""
    initial = np.linspace(0.1, 0.5, 400)
    share = recovered_shares(
        {'arm': initial + 0.1}, initial, np.stack([initial + 0.5, initial + 0.01]), range(400), resamples=200
    )['arm']
    assert share.mean is None
    assert "the oracle's gain +0.255" in share.reason
    assert 'over training seeds is not above 0' in share.reason


@pytest.mark.parametrize('gain', [0.0, -0.5])
def test_no_share_of_a_gain_that_may_be_none(gain):
    random = np.random.default_rng(1)
    initial = random.uniform(size=40)
    oracle = initial + gain + random.normal(0, 0.3, 40)
    share = recovered_shares({'arm': initial + 0.1}, initial, oracle, range(40))['arm']
    assert (share.mean, share.low, share.high) == (None, None, None)
    assert "the oracle's gain" in share.reason
    assert 'is not above 0' in share.reason


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: outcomes_of('initial', []), "outcomes of 'initial': expected at least one person, found none"),
        (lambda: outcomes_of('x', [row(0.5), {}]), "outcomes of 'x', row 1: satisfaction is missing"),
        (lambda: outcomes_of('x', [row('0.5')]), "row 0: expected satisfaction of type int or float, found '0.5'"),
        (lambda: outcomes_of('x', [row(0.5, left=True)]), 'row 0: expected left or accepted, found both'),
        (lambda: split_name('oracle'), "called 'initial' or 'ARM/seed-K', found 'oracle'"),
        (lambda: split_name('oracle/seed-01'), "found 'oracle/seed-01'"),
        (
            lambda: compare(outcomes(oracle_0=[0.1]), vote=vote),
            "expected 'initial' among the assistants, found oracle/seed-0",
        ),
        (
            lambda: compare(outcomes(initial=[0.1], oracle_0=[0.1, 0.2]), vote=vote),
            "outcomes of 'oracle/seed-0': expected 1 people, found 2",
        ),
        (
            lambda: recovered_shares({'arm': np.zeros((2, 3))}, np.zeros(4), np.ones(4), range(4)),
            "expected 4 people of 'arm', found 3",
        ),
        (
            lambda: recovered_shares({'arm': np.full(2, np.nan)}, np.zeros(2), np.ones(2), range(2)),
            "expected finite satisfactions of 'arm', found nan",
        ),
        (lambda: recovered_shares({}, np.zeros(0), np.zeros(0), []), 'expected at least one person'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
