"""Who lives in the concierge world: people, drawn one by one, and the stereotypes that a base user model knows.

Both are points in one space of traits; `TABLE` holds where. A person is a function of the world, the split and a
number, and has an id to be found again by.
"""

import dataclasses
import random
from collections.abc import Mapping

from simrl.conversations.records import SPLITS
from simrl.worlds.concierge.language import ANY, ATTRIBUTES, Intent

PEOPLE = 'people'
LEAST_CARED = 2  # attributes that matter to anyone


@dataclasses.dataclass(frozen=True)
class Traits:
    """How someone talks. All but `patience` are probabilities; `concierge.py` says what is done with each."""

    discloses: float  # to tell a further attribute that nobody asked for
    typos: float  # to mistype a value
    typo_spread: float  # that a typo is drawn from the word's three, and is not its first
    synonyms: float  # to use a value's synonym
    beside: float  # to answer a question beside the point
    patience: float  # what an assistant may spend, in the costs of `concierge.py`
    tolerance: float  # to accept a place with one thing wrong
    denies: float  # to say what is wrong with a place instead of what is wanted
    corrects_more: float  # to correct a further thing that is wrong
    remarks: float  # to add a side remark
    polite: float  # to greet at first; to say please
    vague: float  # to open without any attribute


@dataclasses.dataclass(frozen=True)
class Beta:
    """The distribution `low + scale * Beta(a, b)`."""

    a: float
    b: float
    low: float = 0.0
    scale: float = 1.0

    def draw(self, rng: random.Random) -> float:
        return self.low + self.scale * rng.betavariate(self.a, self.b)


@dataclasses.dataclass(frozen=True)
class Row:
    """One trait: its distribution over people (a number where all people are equal), and its value by stereotype."""

    people: Beta | float
    default: float
    impatient: float
    typo: float
    vague: float
    rambler: float


NEVER = 13.0  # patience: five assistant turns cost at most 12.5

# fmt: off
TABLE: Mapping[str, Row] = {
    #                    people                              default impatient typo   vague  rambler
    'discloses':     Row(Beta(1.2, 5),                       1.0,    1.0,      1.0,   0.0,   1.0),
    'typos':         Row(Beta(1, 5),                         0.0,    0.0,      0.7,   0.0,   0.0),
    'typo_spread':   Row(1.0,                                0.0,    0.0,      0.0,   0.0,   0.0),
    'synonyms':      Row(Beta(2, 5),                         0.0,    0.0,      0.0,   0.0,   0.0),
    'beside':        Row(Beta(1.2, 5),                       0.0,    0.0,      0.0,   0.0,   0.5),
    'patience':      Row(Beta(2, 2.5, low=0.8, scale=3.2),   NEVER,  0.8,      NEVER, NEVER, NEVER),
    'tolerance':     Row(Beta(2, 4),                         0.0,    0.0,      0.0,   0.0,   0.0),
    'denies':        Row(Beta(2, 4),                         0.0,    0.0,      0.0,   0.0,   0.0),
    'corrects_more': Row(0.0,                                1.0,    1.0,      1.0,   0.0,   1.0),
    'remarks':       Row(Beta(1, 6),                         0.0,    0.0,      0.0,   0.0,   0.7),
    'polite':        Row(Beta(2, 3),                         0.4,    0.4,      0.4,   0.4,   0.4),
    'vague':         Row(0.25,                               0.0,    0.0,      0.0,   1.0,   0.0),
}
# fmt: on
STEREOTYPES: Mapping[str, Traits] = {
    name: Traits(**{trait: getattr(row, name) for trait, row in TABLE.items()})
    for name in ('default', 'impatient', 'typo', 'vague', 'rambler')
}


@dataclasses.dataclass(frozen=True)
class World:
    """Which world: the same seed and dial always hold the same people.

    Attributes:
        seed: of everyone in it.
        dial: how far people are from the 'default' stereotype, in [0, 1]. Someone's traits are
            `(1 - dial) * default + dial * drawn`: at 0 people are the stereotype, at 1 they are as `TABLE` says.
    """

    seed: int = 0
    dial: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f'World.seed: expected a whole number from 0, found {self.seed!r}')
        if isinstance(self.dial, bool) or not isinstance(self.dial, int | float) or not 0 <= self.dial <= 1:
            raise ValueError(f'World.dial: expected a number in [0, 1], found {self.dial!r}')


@dataclasses.dataclass(frozen=True)
class Person:
    """Someone who wants a place: of the people, or a stereotype with an intent."""

    id: str
    intent: Intent
    traits: Traits


def person(world: World, split: str, number: int) -> Person:
    """The number-th of the people in a split, for any number from 0.

    Raises:
        ValueError: there is no such split, or the number is below 0.
    """
    identity = _identity(PEOPLE, split, number)
    rng = _stream(world, 'traits', split, number)
    drawn = {name: row.people.draw(rng) if isinstance(row.people, Beta) else row.people for name, row in TABLE.items()}
    default = STEREOTYPES['default']
    mixed = {name: (1 - world.dial) * getattr(default, name) + world.dial * value for name, value in drawn.items()}
    return Person(identity, _draw_intent(world, split, number), Traits(**mixed))


def stereotyped(world: World, name: str, split: str, number: int) -> Person:
    """A stereotype who wants what the number-th person of the split wants.

    Raises:
        ValueError: there is no such stereotype or split, or the number is below 0.
    """
    if name not in STEREOTYPES:
        raise ValueError(f'stereotype: expected one of {tuple(STEREOTYPES)}, found {name!r}')
    return Person(_identity(name, split, number), _draw_intent(world, split, number), STEREOTYPES[name])


def person_of(world: World, identity: str) -> Person:
    """The person with this id, such as 'people-test-17' or 'vague-train-3'; another id is a ValueError."""
    name, split, number = [*identity.split('-'), '', ''][:3]
    known = name == PEOPLE or name in STEREOTYPES
    if not known or not (number.isascii() and number.isdigit()) or identity != _identity(name, split, int(number)):
        names = (PEOPLE, *STEREOTYPES)
        raise ValueError(f'person: expected an id NAME-SPLIT-NUMBER with a name of {names}, found {identity!r}')
    return person(world, split, int(number)) if name == PEOPLE else stereotyped(world, name, split, int(number))


def persona_name(seed: int) -> str:
    """The stereotype that a simulator with personas plays in a conversation, each equally likely."""
    return random.Random(f'persona {seed}').choice(tuple(STEREOTYPES))


def _identity(name: str, split: str, number: int) -> str:
    if split not in SPLITS:
        raise ValueError(f'split: expected one of {SPLITS}, found {split!r}')
    if number < 0:
        raise ValueError(f'number of a person: expected at least 0, found {number}')
    return f'{name}-{split}-{number}'


def _stream(world: World, use: str, split: str, number: int) -> random.Random:
    """A source of draws of its own. Seeds are texts: `random` hashes them the same in every process."""
    return random.Random(f'{use} {world.seed} {split} {number}')


def _draw_intent(world: World, split: str, number: int) -> Intent:
    rng = _stream(world, 'intent', split, number)
    while True:  # until enough matters
        values = tuple(rng.choice(a.values) if rng.random() < a.cared else ANY for a in ATTRIBUTES)
        if len(values) - values.count(ANY) >= LEAST_CARED:
            return Intent(values)
