"""What is said of the same people with every assistant: by hand, against known effects, and what is refused."""

import math

import numpy as np
import pytest

from simrl import config
from simrl.evaluation.people import claims_over_seeds, outcomes_of, pairs_of, split_name, summarise_people
from simrl.evaluation.recovered import recovered_shares
from simrl.evaluation.results import ClaimsResult, PeopleResult

SCALE = 0.25 / math.log(9)


def vote(satisfaction: float, other: float) -> float:
    return 1 / (1 + math.exp((other - satisfaction) / SCALE))


def row(satisfaction: float, end: str = 'accepted', **changes):
    return {
        'satisfaction': satisfaction,
        'share_met': satisfaction,
        'left': end == 'left',
        'accepted': end == 'accepted',
        'assistant_turns': 2,
        'first_act': 'ask',
        'truncated': 0,
        **changes,
    }


def outcomes(**scores):
    """`outcomes(initial=[..], persona_1=[..])`: assistants by ARM_SEED with one satisfaction per person."""
    names = {name: name if name == 'initial' else '/seed-'.join(name.rsplit('_', 1)) for name in scores}
    return {names[name]: outcomes_of(names[name], [row(float(x)) for x in values]) for name, values in scores.items()}


def test_two_people_by_hand():
    found = {
        'initial': outcomes_of('initial', [row(0.5), row(0.75, 'left', first_act='propose', truncated=1)]),
        'oracle/seed-0': outcomes_of('oracle/seed-0', [row(0.75), row(0.75, 'turns', assistant_turns=4)]),
    }
    result = summarise_people(found, ['a', 'b'], vote=vote, dial=1.0, resamples=100)
    initial, oracle = result.assistants['initial'], result.assistants['oracle/seed-0']
    assert initial.ends == {'accepted': 0.5, 'left': 0.5, 'turns': 0.0}
    assert initial.first_acts == {'ask': 0.5, 'propose': 0.5}
    assert oracle.first_acts == {'ask': 1.0, 'propose': 0.0}, 'an act that nobody did is a 0, not absent'
    assert (initial.truncated, oracle.truncated) == (0.25, 0.0)
    assert (initial.assistant_turns, oracle.assistant_turns) == (2.0, 3.0)
    assert (initial.gain, initial.win_rate, initial.strict_win_rate) == (None, None, None)
    assert oracle.gain.mean == pytest.approx(0.125)
    assert oracle.win_rate.mean == pytest.approx((0.9 + 0.5) / 2), 'a quarter more is preferred nine times in ten'
    assert oracle.strict_win_rate.mean == 0.75
    assert (result.world.people, oracle.gain.num_clusters) == (2, 2)


def test_differences_are_paired_by_seed_and_by_person():
    """Arms whose seeds swing together: the difference is sure where each alone is not."""
    base = np.linspace(0.1, 0.6, 50)
    found = outcomes(
        initial=base,
        role_play_0=base + 0.1,
        role_play_1=base + 0.2,
        role_play_2=base + 0.3,
        persona_0=base + 0.15,
        persona_1=base + 0.26,
        persona_2=base + 0.34,
        fine_tuned_7=base + 0.3,
    )
    claims = claims_over_seeds(found, range(50), vote=vote, resamples=200)
    assert claims.seeds == (0, 1, 2, 7)
    assert list(claims.differences) == ['persona - role_play'], 'no seed in common, no difference'
    difference = claims.differences['persona - role_play']
    assert difference.satisfaction.mean == pytest.approx(0.05)
    assert difference.satisfaction.low > 0.02
    assert difference.satisfaction.p_value == 0.25, 'three seeds cannot say more'
    assert claims.arms['persona'].satisfaction.low < claims.arms['role_play'].satisfaction.high
    over_people = difference.satisfaction_over_people
    assert (over_people.low, over_people.high) == pytest.approx((0.05, 0.05)), 'people cancel within a pair'
    alone = claims.arms['fine_tuned']
    assert (alone.gain.mean, alone.gain.low, alone.gain.p_value) == (pytest.approx(0.3), None, None)
    over_people = alone.gain_over_people
    assert (over_people.low, over_people.high) == pytest.approx((0.3, 0.3))
    assert claims.arms['role_play'].gain_over_people.mean == pytest.approx(0.2)
    assert alone.win_rate.mean == pytest.approx(vote(0.3, 0.0))
    assert alone.recovered.mean is None
    assert alone.recovered.reason == 'no assistant was trained against people'


def test_before_any_arm_is_trained_nothing_is_claimed():
    found = outcomes(initial=[0.1, 0.2])
    claims = claims_over_seeds(found, 'ab', vote=vote, resamples=50)
    assert (claims.seeds, claims.arms, claims.differences) == ((), {}, {})
    assert list(summarise_people(found, 'ab', vote=vote, dial=1.0, resamples=50).assistants) == ['initial']


def test_results_survive_json():
    found = outcomes(initial=[0.1, 0.2, 0.3], oracle_0=[0.5, 0.6, 0.9], oracle_1=[0.4, 0.5, 0.9])
    people = summarise_people(found, 'abc', vote=vote, dial=0.5, resamples=50)
    claims = claims_over_seeds(found, 'abc', vote=vote, resamples=50)
    assert config.from_config_dict(PeopleResult, config.to_dict(people), 'people.json') == people
    assert config.from_config_dict(ClaimsResult, config.to_dict(claims), 'claims.json') == claims


def test_the_recovered_share_covers_the_truth():
    """200 populations of 100 people: an arm that recovers 0.6 of a gain of 0.3, through noise that people share."""
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        person = random.normal(0.4, 0.3, 100)
        initial, arm, oracle = (person + gain + random.normal(0, 0.2, (2, 100)) for gain in (0.0, 0.18, 0.3))
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


@pytest.mark.parametrize('gain', [0.0, -0.5])
def test_no_share_of_a_gain_that_may_be_none(gain):
    random = np.random.default_rng(1)
    initial = random.uniform(size=40)
    oracle = initial + gain + random.normal(0, 0.3, 40)
    share = recovered_shares({'arm': initial + 0.1}, initial, oracle, range(40))['arm']
    assert (share.mean, share.low, share.high) == (None, None, None)
    assert "the oracle's gain" in share.reason
    assert 'is not above 0' in share.reason


def test_pairs_and_names():
    assert split_name('role_play-small/seed-12') == ('role_play-small', 12)
    assert pairs_of(('role_play', 'fine_tuned-small', 'oracle', 'fine_tuned-large', 'fine_tuned')) == (
        ('fine_tuned', 'role_play'),
        ('oracle', 'fine_tuned'),
        ('fine_tuned-large', 'fine_tuned'),
        ('fine_tuned', 'fine_tuned-small'),
    )


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
            lambda: summarise_people(outcomes(oracle_0=[0.1]), 'a', vote=vote, dial=1.0),
            "expected 'initial' among the assistants, found oracle/seed-0",
        ),
        (
            lambda: claims_over_seeds(outcomes(initial=[0.1], oracle_0=[0.1, 0.2]), 'a', vote=vote),
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
