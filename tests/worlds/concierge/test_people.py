"""People of the concierge world: they differ from stereotypes, and draws follow the table."""

import collections
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from simrl.conversations.records import SPLITS
from simrl.worlds.concierge.language import ANY, ATTRIBUTES
from simrl.worlds.concierge.people import (
    NEVER,
    STEREOTYPES,
    TABLE,
    Beta,
    Traits,
    World,
    person,
    person_of,
    persona_name,
    stereotyped,
)

FIELDS = tuple(field.name for field in dataclasses.fields(Traits))
PEOPLE = [person(World(), 'test', number) for number in range(3000)]


def mean(people: Beta | float) -> float:
    return people.low + people.scale * people.a / (people.a + people.b) if isinstance(people, Beta) else people


def test_each_caricature_differs_from_the_default_in_what_its_name_says():
    default = dataclasses.asdict(STEREOTYPES['default'])
    differences = {
        name: {trait: value for trait, value in dataclasses.asdict(traits).items() if value != default[trait]}
        for name, traits in STEREOTYPES.items()
    }
    assert differences == {
        'default': {},
        'impatient': {'patience': 0.8},
        'typo': {'typos': 0.7},
        'vague': {'discloses': 0, 'corrects_more': 0, 'vague': 1},
        'rambler': {'beside': 0.5, 'remarks': 0.7},
    }


def test_people_differ_from_the_default_in_everything_but_manners():
    assert tuple(TABLE) == FIELDS
    differences = {trait: round(mean(row.people) - row.default, 3) for trait, row in TABLE.items()}
    assert differences == {
        'discloses': -0.806,
        'typos': 0.167,
        'typo_spread': 1.0,
        'synonyms': 0.286,
        'beside': 0.194,
        'patience': round(0.8 + 3.2 * 2 / 4.5 - NEVER, 3),
        'tolerance': 0.333,
        'denies': 0.333,
        'corrects_more': -1.0,
        'remarks': 0.143,
        'polite': 0.0,
        'vague': 0.25,
    }


@pytest.mark.parametrize('trait', FIELDS)
def test_traits_are_drawn_as_the_table_says(trait):
    people = TABLE[trait].people
    drawn = np.array([getattr(someone.traits, trait) for someone in PEOPLE])
    if not isinstance(people, Beta):
        assert (drawn == people).all()
        return
    total = people.a + people.b
    variance = people.scale**2 * people.a * people.b / (total**2 * (total + 1))
    assert abs(drawn.mean() - mean(people)) < 4 * math.sqrt(variance / len(drawn))
    assert drawn.var() == pytest.approx(variance, rel=0.15)
    assert people.low <= drawn.min()
    assert drawn.max() <= people.low + people.scale


def test_traits_are_independent():
    drawn = np.array([[getattr(p.traits, t) for t in FIELDS if isinstance(TABLE[t].people, Beta)] for p in PEOPLE])
    correlation = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
    assert np.abs(correlation).max() < 4.5 / math.sqrt(len(PEOPLE))


def test_intents_are_drawn_as_stated():
    patterns = list(itertools.product((False, True), repeat=4))
    chance = {p: math.prod(a.cared if c else 1 - a.cared for a, c in zip(ATTRIBUTES, p, strict=True)) for p in patterns}
    enough = {pattern: value for pattern, value in chance.items() if sum(pattern) >= 2}
    found = collections.Counter(tuple(value != ANY for value in p.intent.values) for p in PEOPLE)
    assert set(found) == set(enough)
    for pattern, value in enough.items():
        share = value / sum(enough.values())
        assert abs(found[pattern] / len(PEOPLE) - share) < 4 * math.sqrt(share * (1 - share) / len(PEOPLE))
    for number, attribute in enumerate(ATTRIBUTES):
        values = collections.Counter(p.intent.values[number] for p in PEOPLE)
        del values[ANY]
        assert set(values) == set(attribute.values)
        share = 1 / len(attribute.values)
        for count in values.values():
            assert abs(count / values.total() - share) < 4 * math.sqrt(share * (1 - share) / values.total())


def test_the_dial_goes_from_the_default_to_people():
    default = STEREOTYPES['default']
    for number in range(50):
        drawn, half, none = (person(World(dial=dial), 'train', number) for dial in (1.0, 0.5, 0.0))
        assert none.traits == default
        assert drawn.traits != default
        assert none.intent == half.intent == drawn.intent
        for trait in FIELDS:
            middle = (getattr(default, trait) + getattr(drawn.traits, trait)) / 2
            assert getattr(half.traits, trait) == pytest.approx(middle)


def test_splits_numbers_and_seeds_are_other_people():
    worlds = [World(seed=seed) for seed in range(2)]
    for world in worlds:
        ids = [person(world, split, number).id for split in SPLITS for number in range(50)]
        assert len(set(ids)) == len(ids)
    drawn = {person(world, split, number).traits for world in worlds for split in SPLITS for number in range(50)}
    assert len(drawn) == 2 * 3 * 50


def test_a_person_is_a_function_of_the_arguments():
    random.seed(1)
    before = person(World(seed=3), 'dev', 7)
    random.seed(2)
    assert person(World(seed=3), 'dev', 7) == before


def test_ids_find_their_persons():
    world = World(seed=5, dial=0.3)
    assert person(world, 'test', 17).id == 'people-test-17'
    assert person_of(world, 'people-test-17') == person(world, 'test', 17)
    for name in STEREOTYPES:
        someone = stereotyped(world, name, 'train', 4)
        assert someone.traits == STEREOTYPES[name]
        assert someone.intent == person(world, 'train', 4).intent
        assert person_of(world, someone.id) == someone


@pytest.mark.parametrize(
    'identity',
    [
        *('', 'people', 'people-test', 'people-test-', 'people-test-x', 'people-test--1', 'people-test-01'),
        *('people-test-1-2', 'robots-test-1', 'people-test-²', ' people-test-1'),
    ],
)
def test_other_ids_are_nobodys(identity):
    with pytest.raises(ValueError, match=f'NAME-SPLIT-NUMBER .*, found {identity!r}'):
        person_of(World(), identity)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: World(seed=-1), r'World\.seed: expected a whole number from 0, found -1'),
        (lambda: World(seed=1.5), r'World\.seed: .*found 1\.5'),
        (lambda: World(dial=1.01), r'World\.dial: expected a number in \[0, 1\], found 1\.01'),
        (lambda: World(dial=float('nan')), r'World\.dial: .*found nan'),
        (lambda: World(dial='1'), r"World\.dial: .*found '1'"),
        (lambda: person(World(), 'valid', 0), r"split: expected one of .*, found 'valid'"),
        (lambda: person(World(), 'test', -1), 'number of a person: expected at least 0, found -1'),
        (lambda: person_of(World(), 'people-valid-1'), r"split: expected one of .*, found 'valid'"),
        (lambda: stereotyped(World(), 'angry', 'test', 0), r"stereotype: expected one of \('default', .*'angry'"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_personas_are_equally_likely():
    names = collections.Counter(persona_name(seed) for seed in range(5000))
    assert set(names) == set(STEREOTYPES)
    assert all(abs(count / 5000 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 5000) for count in names.values())
