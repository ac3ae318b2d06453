"""The cross-simulator matrix: paired by conversation and by seed, with every simulator, held-out ones too."""

import dataclasses
import itertools

import numpy as np
import pytest

from simrl.evaluation.matrix import matrix_of, transfers
from simrl.evaluation.outcomes import outcomes_of
from simrl.evaluation.results.measures import Arm
from simrl.evaluation.seeds import t_interval
from tests.evaluation.made_up import FAILURE, columns, outcomes, runs_of

ARMS = {'plain': Arm('prompted'), 'tuned': Arm('tuned'), 'other': Arm('tuned', held_out=True)}
SIMULATORS = {'plain': 'plain', 'tuned/seed-0': 'tuned', 'tuned/seed-1': 'tuned', 'other': 'other'}
RUNS = {'plain': {0: 'plain/seed-0', 1: 'plain/seed-1'}, 'tuned': {0: 'tuned/seed-0', 1: 'tuned/seed-1'}}
CLUSTERS = ['a', 'a', 'b', 'c', 'c', 'd', 'e', 'f']


def met_like(scores, **changes):
    """Outcomes by assistant and simulator from a function of the two."""
    met = {}
    for who in ('initial', *itertools.chain(*(by_seed.values() for by_seed in RUNS.values()))):
        seed = who.partition('/')[2]
        names = [name for name in SIMULATORS if not seed or '/' not in name or name.endswith(seed)]
        met[who] = {
            name: outcomes_of(f'{who}/{name}', columns(scores(who, name), cluster=CLUSTERS, **changes))
            for name in names
        }
    return met


@pytest.fixture(scope='module')
def scores():
    """Of 8 examples; some have none, but on the first all have one."""
    random = np.random.default_rng(0)
    names = ['initial', *itertools.chain(*(by_seed.values() for by_seed in RUNS.values()))]
    found = {}
    for who in names:
        for name in SIMULATORS:
            drawn = random.integers(0, 11, 8) / 10
            lost = random.random(8) < 0.2
            found[who, name] = [float(x) if i == 0 or not lost[i] else None for i, x in enumerate(drawn)]
    return found


def name_of(user, seed):
    """The simulator of an arm that an assistant of a training seed meets."""
    return f'{user}/seed-{seed}' if user == 'tuned' else user


def difference(first, second):
    """By example, of those that both have."""
    pairs = zip(first, second, strict=True)
    return [None if x is None or y is None else x - y for x, y in pairs]


def mean(values):
    there = [x for x in values if x is not None]
    return sum(there) / len(there) if there else None


def test_every_difference_is_of_the_same_conversations_and_the_same_simulator(scores):
    """Against loops over the examples."""
    met = met_like(lambda who, name: scores[who, name])
    found = matrix_of(met, SIMULATORS, RUNS, ARMS, score='reward', times=100, resamples=300)
    assert found.users == ('plain', 'tuned', 'other')
    assert [(x.user, x.first, x.second, x.seeds) for x in found.differences] == [
        (user, 'tuned', 'plain', (0, 1)) for user in found.users
    ]
    for row, user in enumerate(found.users):
        of_seed = [name_of(user, seed) for seed in (0, 1)]
        for column, who in enumerate(found.assistants):
            names = [name for name in met[who] if SIMULATORS[name] == user]
            by_example = [mean([scores[who, name][i] for name in names]) for i in range(8)]
            assert found.mean[row][column] == pytest.approx(mean(by_example))
            every = [x for name in names for x in scores[who, name]]
            assert found.conversations[row][column] == sum(x is not None for x in every)
            assert found.failed[row][column] == sum(x is None for x in every)
        sides = [(arm, 'initial') for arm in RUNS] + [('tuned', 'plain')]
        for first, second in sides:
            of_seeds = []
            for seed, name in enumerate(of_seed):
                other = 'initial' if second == 'initial' else RUNS[second][seed]
                of_seeds.append(difference(scores[RUNS[first][seed], name], scores[other, name]))
            if second == 'initial':
                over_seeds = found.transfers[first].simulators[user]
                checkpoints = found.transfers[first].checkpoints[user]
            else:
                (pair,) = (x for x in found.differences if x.user == user)
                over_seeds, checkpoints = pair.score, pair.checkpoint_score
            assert over_seeds.values == pytest.approx([mean(x) for x in of_seeds])
            assert (over_seeds.low, over_seeds.high) == pytest.approx(
                (lambda x: (x.low, x.high))(t_interval([mean(x) for x in of_seeds], null=0.0))
            )
            by_example = [mean([x[i] for x in of_seeds]) for i in range(8)]
            assert checkpoints.mean == pytest.approx(mean(by_example))
            there = [i for i, x in enumerate(by_example) if x is not None]
            assert checkpoints.num_observations == len(there)
            assert checkpoints.num_clusters == len({CLUSTERS[i] for i in there})
            assert checkpoints.low < checkpoints.mean < checkpoints.high
    for arm, group in (('plain', ('tuned', 'other')), ('tuned', ('plain',))):
        transfer = found.transfers[arm]
        assert transfer.other_kinds.values == pytest.approx(
            [mean([transfer.simulators[user].values[seed] for user in group]) for seed in (0, 1)]
        )
        by_user = [
            [
                mean(
                    [
                        difference(scores[who, name_of(user, k)], scores['initial', name_of(user, k)])[i]
                        for k, who in runs
                    ]
                )
                for i in range(8)
            ]
            for user in group
            for runs in [RUNS[arm].items()]
        ]
        over_users = [mean([x[i] for x in by_user]) for i in range(8)]
        assert transfer.checkpoint_other_kinds.mean == pytest.approx(mean(over_users))
        assert transfer.checkpoint_held_out == transfer.checkpoints['other'], 'the one that is held out'
    assert found.causes == {
        FAILURE: sum(x is None for (who, name), of in scores.items() for x in of if name in met[who])
    }


def test_what_conversations_share_cancels_in_a_pair_and_not_in_a_cell():
    """People differ much, and one assistant is better with each of them by nearly the same."""
    hard = np.linspace(0, 0.8, 8)
    noise = {who: 0.01 * np.random.default_rng(i).random(8) for i, who in enumerate(('initial', 'plain', 'tuned'))}

    def score(who, name):
        return hard + noise[who.partition('/')[0]] + {'initial': 0, 'plain': 0.05, 'tuned': 0.1}[who.partition('/')[0]]

    found = matrix_of(met_like(score), SIMULATORS, RUNS, ARMS, score='reward', resamples=300)
    place = found.assistants.index('tuned/seed-0')
    assert found.low[0][place] < found.mean[0][0] < found.high[0][place], 'each alone tells them not apart'
    for user in found.users:
        gain = found.transfers['tuned'].checkpoints[user]
        assert 0.09 < gain.low < gain.mean < gain.high < 0.12
    assert all(0.03 < x.checkpoint_score.low < x.checkpoint_score.high < 0.07 for x in found.differences)


def test_of_a_panel_each_judge_has_means_and_the_panel_its_votes(scores):
    """Judges by which the score is made, over the conversations that have one; without two of them nothing."""

    def of(shift):
        return lambda who, name: [
            None if x is None else x / 2 + shift * (i % 2) for i, x in enumerate(scores[who, name])
        ]

    met = met_like(lambda who, name: scores[who, name])
    parts = {judge: met_like(of(shift)) for judge, shift in (('judge_a', 0.0), ('judge_b', 0.5))}
    for who, found in met.items():
        for name, x in found.items():
            own = {judge: other[who][name].score for judge, other in parts.items()}
            found[name] = dataclasses.replace(x, parts=x.parts | own)
    found = matrix_of(met, SIMULATORS, RUNS, ARMS, score='score', resamples=50)
    assert list(found.judges) == ['judge_a', 'judge_b']
    for judge, shift in (('judge_a', 0.0), ('judge_b', 0.5)):
        for row, user in enumerate(found.users):
            for column, who in enumerate(found.assistants):
                own = [x for name in met[who] if SIMULATORS[name] == user for x in of(shift)(who, name)]
                assert found.judges[judge][row][column] == pytest.approx(mean(own))
    assert 0 < found.votes.mean_correlation < 1
    assert found.votes.effective == pytest.approx(2 / (1 + found.votes.mean_correlation))
    assert matrix_of(met_like(of(0.0)), SIMULATORS, RUNS, ARMS, score='score', resamples=50).judges == {}


def test_people_are_the_last_user_with_examples_of_their_own():
    met = met_like(lambda who, name: [0.1 * i for i in range(8)])
    with_people = {who: outcomes_of(who, columns([0.5, 0.25, None])) for who in met}
    found = matrix_of(met, SIMULATORS, RUNS, ARMS, score='reward', people=('people', with_people), resamples=20)
    assert (found.users[-1], found.people) == ('people', 'people')
    assert found.mean[-1] == (0.375,) * 5
    assert (found.conversations[-1], found.failed[-1]) == ((2,) * 5, (1,) * 5)
    assert 'people' not in {x.user for x in found.differences}, 'the measure has them'


def test_held_out_simulators_are_the_same_for_every_arm():
    """Of whatever kind: the mean gain with them is comparable between arms, unlike that with other kinds."""
    arms = ARMS | {'another': Arm('prompted', held_out=True)}
    met = {
        'initial': {'plain': 0.5, 'tuned': 0.5, 'other': 0.2, 'another': 0.4},
        'plain/seed-0': {'plain': 0.9, 'tuned': 0.6, 'other': 0.3, 'another': 0.6},
        'tuned/seed-0': {'plain': 0.7, 'tuned': 0.8, 'other': 0.6, 'another': 0.6},
    }
    runs = {'plain': {0: 'plain/seed-0'}, 'tuned': {0: 'tuned/seed-0'}}
    found = transfers(runs, arms, {name: name for name in arms}, scores_of(met))
    assert found['plain'].held_out.mean == pytest.approx((0.1 + 0.2) / 2)
    assert found['tuned'].held_out.mean == pytest.approx((0.4 + 0.2) / 2)
    assert found['plain'].other_kinds.mean == pytest.approx((0.1 + 0.1) / 2), 'tuned and other'
    assert found['tuned'].other_kinds.mean == pytest.approx((0.2 + 0.2) / 2), 'plain and another'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'examples': tuple(f'person-{k}' for k in range(1, 9))}, r"found 8 of 'tuned/seed-1' with 'other', 7 of them"),
        ({'examples': tuple(f'person-{k}' for k in (1, 0, *range(2, 8)))}, r'expected the 8 examples of every cell in'),
        ({'clusters': tuple('abcdefgh')}, r'expected the 8 examples of every cell in'),
    ],
)
def test_conversations_of_other_examples_are_no_pairs(change, message):
    met = met_like(lambda who, name: [0.1 * i for i in range(8)])
    met['tuned/seed-1']['other'] = dataclasses.replace(met['tuned/seed-1']['other'], **change)
    with pytest.raises(ValueError, match=f'^matrix: .*{message}'):
        matrix_of(met, SIMULATORS, RUNS, ARMS, score='reward', resamples=20)


def test_an_example_that_comes_twice_is_named():
    met = met_like(lambda who, name: [0.5] * 8, example=['p', 'q', 'r', 'q', 's', 't', 'u', 'v'])
    with pytest.raises(ValueError, match="matrix: expected each example once, found 'q' more often"):
        matrix_of(met, SIMULATORS, RUNS, ARMS, score='reward', resamples=20)


def test_assistants_without_a_conversation_in_common_are_no_pair():
    def score(who, name):
        return [None, *[0.5] * 7] if who == 'initial' else [0.5, *[None] * 7]

    with pytest.raises(ValueError, match=r'^plain/seed-0 with plain and initial with plain: expected an example'):
        matrix_of(met_like(score), SIMULATORS, RUNS, ARMS, score='reward', resamples=20)


def scores_of(met):
    """Scores of one example each."""
    return {who: {user: np.array([mean]) for user, mean in users.items()} for who, users in met.items()}


def test_transfer_is_the_gain_with_the_same_simulator_of_the_same_seed():
    """A simulator that is trained anew for each seed is another user in each: the initial assistant met both."""
    base = [0.2, 0.3]
    found = outcomes(initial=base, small_0=base, small_1=base, tuned_0=base, best_1=base)
    arms = {'small': Arm('prompted'), 'large': Arm('prompted'), 'tuned': Arm('tuned'), 'best': Arm('people', True)}
    simulators = {'small': 'small', 'large': 'large', 'tuned/seed-0': 'tuned', 'tuned/seed-1': 'tuned'}
    met = {
        'initial': {'small': 0.5, 'large': 0.6, 'tuned/seed-0': 0.1, 'tuned/seed-1': 0.3},
        'small/seed-0': {'small': 0.9, 'large': 0.9, 'tuned/seed-0': 0.1},
        'small/seed-1': {'small': 0.8, 'large': 0.7, 'tuned/seed-1': 0.5},
        'tuned/seed-0': {'small': 0.5, 'large': 0.8, 'tuned/seed-0': 0.7},
        'best/seed-1': {'small': 0.4, 'large': 0.9, 'tuned/seed-1': 0.5},
    }
    found = transfers(runs_of(found), arms, simulators, scores_of(met))
    small = found['small']
    assert small.seeds == (0, 1)
    assert {user: gain.values for user, gain in small.simulators.items()} == {
        'small': pytest.approx((0.4, 0.3)),
        'large': pytest.approx((0.3, 0.1)),
        'tuned': pytest.approx((0.0, 0.2)),
    }
    assert small.other_kinds.values == pytest.approx((0.0, 0.2)), 'another simulator of its own kind is no other kind'
    assert small.other_kinds.low < 0.1 < small.other_kinds.high
    assert found['tuned'].other_kinds.values == pytest.approx(((0.0 + 0.2) / 2,))
    assert found['best'].other_kinds.values == pytest.approx(((-0.1 + 0.3 + 0.2) / 3,)), 'all are others'
    alone = transfers(
        {'one': {0: 'one/seed-0'}},
        {'one': Arm('x')},
        {'one': 'one'},
        scores_of({'initial': {'one': 0.1}, 'one/seed-0': {'one': 0.2}}),
    )
    assert alone['one'].other_kinds is None
