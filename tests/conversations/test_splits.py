"""Splits by user: no user in two splits, each country in proportion, whatever the order of the data."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.conversations.splits import SplitSettings, UserSplits, hash64, split_of, split_users

COUNTRIES = ('Peru', 'Chile', 'Benin', 'Kenya')
ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, len(COUNTRIES) - 1)), min_size=1, max_size=120)


def split(rows: list[tuple[int, int]], chosen: UserSplits, countries: tuple[str, ...] = COUNTRIES) -> list[int]:
    address = np.array([hash64(f'user {user}') for user, _ in rows], np.uint64)
    found = split_users(address, np.array([country for _, country in rows], np.uint16), countries, chosen)
    return found.tolist()


@settings(deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(['hashed_ip', 'hashed_ip+country']))
def test_neither_the_order_of_rows_nor_that_of_countries_matters(rows, random, user):
    chosen = UserSplits(dev=0.2, test=0.3, user=user)
    found = split(rows, chosen)
    order, names = list(range(len(rows))), list(range(len(COUNTRIES)))
    random.shuffle(order)
    random.shuffle(names)
    moved = [(rows[i][0], names.index(rows[i][1])) for i in order]
    assert split(moved, chosen, tuple(COUNTRIES[i] for i in names)) == [found[i] for i in order]


@settings(deadline=None)
@given(ROWS, st.floats(0, 0.4), st.floats(0, 0.5), st.integers(0, 5))
def test_a_user_is_in_one_split_and_each_country_is_split_in_proportion(rows, dev, test, seed):
    found = split(rows, UserSplits(dev=dev, test=test, seed=seed))
    of_user: dict[int, set[int]] = collections.defaultdict(set)
    countries: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for (user, country), index in zip(rows, found, strict=True):
        of_user[user].add(index)
        countries[user][COUNTRIES[country]] += 1
    assert all(len(splits) == 1 for splits in of_user.values())
    # Slow: a user counts for the country of most rows, of equal ones the first by name.
    home = {user: min(counts, key=lambda name: (-counts[name], name)) for user, counts in countries.items()}
    for country in COUNTRIES:
        users = [user for user in home if home[user] == country]
        for index, share in ((0, 1 - dev - test), (1, dev), (2, test)):
            number = sum(of_user[user] == {index} for user in users)
            assert abs(number - share * len(users)) <= 1 + 1e-6


def test_a_user_in_two_countries_may_be_in_two_splits_only_where_an_address_and_a_country_are_a_user():
    rows = [(user, country) for user in range(200) for country in (0, 1)]
    for user, several in (('hashed_ip', 0), ('hashed_ip+country', 1)):
        found = split(rows, UserSplits(dev=0.25, test=0.25, user=user))
        apart = sum(found[i] != found[i + 1] for i in range(0, len(rows), 2))
        assert (apart > 0) == several


def test_small_countries_are_not_all_trained_on():
    countries = tuple(f'country {i}' for i in range(2000))
    found = split([(i, i) for i in range(2000)], UserSplits(), countries)
    shares = np.bincount(found) / 2000
    np.testing.assert_allclose(shares, (0.89, 0.05, 0.06), atol=0.02)


def test_seeds_give_other_splits():
    rows = [(user, 0) for user in range(100)]
    assert split(rows, UserSplits(seed=1)) != split(rows, UserSplits(seed=2))
    for keys in (range(1000), range(1000, 2000)):
        shares = collections.Counter(split_of(key, SplitSettings()) for key in keys)
        assert shares['test'] == pytest.approx(60, abs=30)
        assert shares['dev'] == pytest.approx(50, abs=30)


@pytest.mark.parametrize(
    ('change', 'fault'),
    [
        ({'dev': -0.1}, r'UserSplits\.dev: expected a share'),
        ({'test': 1.0}, r'UserSplits\.test: expected a share'),
        ({'dev': 0.5, 'test': 0.5}, r'expected dev \+ test below 1, found 0\.5 \+ 0\.5'),
    ],
)
def test_impossible_shares(change, fault):
    with pytest.raises(ValueError, match=fault):
        dataclasses.replace(UserSplits(), **change)
