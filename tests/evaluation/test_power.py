"""Sample sizes: as published, as simulated studies confirm, and as they must behave."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simrl.evaluation.power import (
    Design,
    UnreachableError,
    checkpoint_power,
    crossed_power,
    design_effect,
    people_needed,
    seeds_needed,
    simulated_power,
)
from tools.power import main

DESIGNS = st.builds(
    Design,
    win_rate=st.sampled_from([0.42, 0.55, 0.58, 0.7]),
    ties=st.sampled_from([0.0, 0.2, 0.5]),
    turns=st.integers(1, 8),
    icc=st.sampled_from([0.0, 0.1, 0.3]),
    seed_sd=st.sampled_from([0.01, 0.03, 0.06]),
    arms=st.sampled_from([1, 5]),
)


@pytest.mark.parametrize(
    ('win_rate', 'icc', 'people'),
    [(0.6, 0.1, 54), (0.6, 0.3, 85), (0.58, 0.1, 85), (0.58, 0.2, 110), (0.58, 0.3, 134), (0.55, 0.1, 219)],
)
def test_people_for_five_turns_each_are_nearly_those_of_the_normal_formula(win_rate, icc, people):
    """(z 1/2 + z' sqrt(w (1 - w)))^2 / (w - 1/2)^2 x design effect / turns: within 3 people of the t-interval's."""
    assert people_needed(Design(win_rate=win_rate, icc=icc)) == pytest.approx(people, abs=3)


@pytest.mark.parametrize('people', [3, 20, 86])
def test_the_power_of_one_checkpoint_is_that_of_the_noncentral_t(people):
    design = Design(win_rate=0.65)
    shift, bound = 0.15 / np.sqrt((design.shared + design.own) / people), stats.t.ppf(0.975, people - 1)
    expected = stats.nct.sf(bound, people - 1, shift) + stats.nct.cdf(-bound, people - 1, shift)
    assert checkpoint_power(design, people) == pytest.approx(expected, abs=2e-3)


def test_the_design_effect_of_textbooks():
    assert design_effect(Design(turns=5, icc=0.1)) == pytest.approx(1.4)
    assert design_effect(Design(turns=1, icc=0.9)) == 1


@settings(max_examples=15, deadline=None)
@given(DESIGNS, st.sampled_from([0.5, 0.8, 0.95]))
def test_the_number_is_the_smallest_that_suffices(design, power):
    people = people_needed(design, power=power)
    assert checkpoint_power(design, people) >= power
    assert people == 2 or checkpoint_power(design, people - 1) < power
    try:
        seeds = seeds_needed(design, 4 * people, power=power)
    except UnreachableError:
        assert crossed_power(design, 4 * people, 1000) < power
        return
    assert crossed_power(design, 4 * people, seeds) >= power
    assert seeds == 2 or crossed_power(design, 4 * people, seeds - 1) < power


@settings(max_examples=30, deadline=None)
@given(DESIGNS, st.integers(5, 400), st.integers(4, 9))
def test_more_of_anything_helps_and_more_spread_hurts(design, people, seeds):
    power = crossed_power(design, people, seeds)
    assert 0 < power <= 1
    assert crossed_power(design, 2 * people, seeds) >= power - 5e-3
    assert crossed_power(design, people, seeds + 1) >= power - 5e-3
    assert crossed_power(dataclasses.replace(design, seed_sd=2 * design.seed_sd), people, seeds) <= power + 5e-3
    assert checkpoint_power(dataclasses.replace(design, icc=0.6), people) <= checkpoint_power(design, people) + 1e-9
    mirrored = dataclasses.replace(design, win_rate=1 - design.win_rate)
    assert crossed_power(mirrored, people, seeds) == pytest.approx(power)


def test_no_number_of_people_makes_up_for_two_seeds():
    design = Design(seed_sd=0.05)
    with pytest.raises(
        UnreachableError, match=r'of 80%, found at most \d+\.\d% by any number of people with 2 training'
    ):
        people_needed(design, seeds=2)
    with pytest.raises(UnreachableError, match=r'found at most \d+\.\d% by any number of training seeds with 5 people'):
        seeds_needed(design, 5)
    assert people_needed(design, seeds=6) > people_needed(dataclasses.replace(design, seed_sd=0.01), seeds=6)


def confirm(design, people, seeds, studies):
    """The simulated power is within 2 points of the computed one, and three standard errors of the simulation."""
    computed = checkpoint_power(design, people) if seeds is None else crossed_power(design, people, seeds)
    simulated = simulated_power(design, people, seeds, studies=studies)
    assert simulated == pytest.approx(computed, abs=0.02 + 3 * np.sqrt(computed * (1 - computed) / studies))
    return simulated, computed


@pytest.mark.parametrize('seeds', [None, 5])
def test_simulated_studies_confirm_it(seeds):
    design = Design(ties=0.2, icc=0.2)
    confirm(design, people_needed(design, seeds=seeds), seeds, 500)


@pytest.mark.long
@pytest.mark.parametrize('seeds', [None, 3, 5, 8])
@pytest.mark.parametrize('design', [Design(), Design(ties=0.3, icc=0.3, seed_sd=0.02, arms=4), Design(0.65, turns=1)])
def test_five_thousand_simulated_studies_confirm_it_within_two_points(design, seeds):
    people = people_needed(design) if seeds is None else 120
    computed = checkpoint_power(design, people) if seeds is None else crossed_power(design, people, seeds)
    assert simulated_power(design, people, seeds, studies=5000) == pytest.approx(computed, abs=0.02)


def test_simulated_judgements_are_as_assumed():
    """By turns of one person each: win rate, ties, and the correlation within a person."""
    from simrl.evaluation.power import _person_means

    design, random = Design(win_rate=0.6, ties=0.3, turns=1, icc=0.25), np.random.default_rng(0)
    means = _person_means(dataclasses.replace(design, seed_sd=0.0), (20, 1, 2, 2000), 2, random)[:, 0]
    assert means.mean() == pytest.approx(0.6, abs=0.01)
    assert (means == 0.5).mean() == pytest.approx(0.3, abs=0.01)
    assert means.var() == pytest.approx(design.variance, abs=0.005)
    correlation = np.corrcoef(means[:, 0].ravel(), means[:, 1].ravel())[0, 1]
    assert correlation == pytest.approx(0.25, abs=0.02)
    of_seeds = _person_means(dataclasses.replace(design, seed_sd=0.05), (400, 1, 4, 400), 4, random).mean(-1)
    within = of_seeds.var(axis=2, ddof=1).mean() - (design.own / 400)
    assert np.sqrt(within) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: Design(win_rate=0.5), r'Design: expected win_rate in \(0, 1\) and not 1/2, found 0.5'),
        (lambda: Design(win_rate=58), 'expected win_rate .*, found 58'),
        (lambda: Design(ties=0.9), 'expected ties from 0 to 0.84, twice the win rate of the weaker side, found 0.9'),
        (lambda: Design(turns=0), 'expected turns of at least 1, found 0'),
        (lambda: Design(icc=float('nan')), 'expected icc from 0 to 1, found nan'),
        (lambda: Design(seed_sd=-1), 'expected seed_sd from 0 to 0.5, found -1'),
        (lambda: Design(arms=0), 'expected arms of at least 1, found 0'),
        (lambda: Design(level=95), r'expected level in \(0, 1\), found 95'),
        (lambda: people_needed(Design(), power=80), r'expected a power in \(0, 1\), found 80'),
        (lambda: checkpoint_power(Design(), 1), 'checkpoint_power: expected at least 2 people, found 1'),
        (lambda: people_needed(Design(), seeds=1), 'crossed_power: expected at least 2 seeds, found 1'),
        (lambda: simulated_power(Design(), 1), 'simulated_power: expected at least 2 people, found 1'),
        (lambda: simulated_power(Design(), 9, 1), 'simulated_power: expected at least 2 seeds, found 1'),
        (lambda: simulated_power(Design(), 9, studies=0), 'expected at least 1 study, found 0'),
        (lambda: simulated_power(Design(icc=1), 9, 2), 'expected an icc below 1'),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_tool_prints_what_is_needed(capsys):
    main(['--people=283', '--seeds', '2', '12', '--seed-sd=0.05', '--check', '--studies=20'])
    printed = capsys.readouterr().out
    design = Design(seed_sd=0.05)
    assert f'One checkpoint, interval over people: {people_needed(design)} people (' in printed
    assert f'     12{people_needed(design, seeds=12):>12,}' in printed
    assert '      2           –' in printed
    assert f'with {seeds_needed(design, 283)} training seeds, the fewest that suffice' in printed
    assert printed.count('of 20 simulated studies') == 3
    main(['--people=5', '--seeds', '2'])
    assert 'of a simulator none: expected a power of 80%, found at most' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--win-rate=58'], 'expected win_rate in (0, 1) and not 1/2, found 58'),
        (['--seeds', '1'], 'expected at least 2 seeds, found 1'),
        (['--people=1'], 'checkpoint_power: expected at least 2 people, found 1'),
        (['--turns=x'], "argument --turns: invalid int value: 'x'"),
    ],
)
def test_the_tool_refuses_with_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err


def test_the_tool_explains_itself(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    text = capsys.readouterr().out
    assert 'Two questions, two numbers.' in text
    assert 'nominal coverage of the intervals (0.95)' in text
