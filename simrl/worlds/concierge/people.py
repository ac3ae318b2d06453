"""People of the concierge world, drawn one by one, and the stereotypes that a base user model knows.

Both are points in one space of traits, given by `TABLE`. A person is a function of the world, the split and a number,
all of which can be read from the person's id.
"""

import dataclasses
import random
from collections.abc import Mapping

from simrl.conversations.records import SPLITS
from simrl.worlds.concierge.language import ANY, ATTRIBUTES, Intent

PEOPLE = 'people'
LEAST_CARED = 2  # least number of attributes that matter to a person


@dataclasses.dataclass(frozen=True)
class Traits:
    """Traits of a person. All but `patience` are probabilities; `replies.py` says how each is used."""

    discloses: float  # to tell another attribute unasked
    typos: float  # to mistype a value
    typo_spread: float  # to draw a typo from the word's three instead of taking the first
    synonyms: float  # to use a value's synonym
    beside: float  # to give an unrelated answer to a question
    patience: float  # budget for the costs of an assistant's messages (`replies.cost`)
    tolerance: float  # to accept a place with one thing wrong
    denies: float  # to name a wrong value instead of the wanted one
    corrects_more: float  # to correct another wrong attribute
    remarks: float  # to add a side remark
    polite: float  # to greet in the opening; to say please
    vague: float  # to name no attribute in the opening


@dataclasses.dataclass(frozen=True)
class Beta:
    """A distribution: `low + scale * Beta(a, b)`."""

    a: float
    b: float
    low: float = 0.0
    scale: float = 1.0

    def draw(self, rng: random.Random) -> float:
        return self.low + self.scale * rng.betavariate(self.a, self.b)


@dataclasses.dataclass(frozen=True)
class Row:
    """One trait: its distribution over people (a number if all are equal), and its value per stereotype."""

    people: Beta | float
    default: float
    impatient: float
    typo: float
    vague: float
    rambler: float


NEVER = 13.0  # patience that five assistant messages (cost at most 12.5) do not use up

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
    """A world: equal seeds and dials give equal people.

    Attributes:
        seed: of all people.
        dial: distance of people from the 'default' stereotype, in [0, 1]. A person's traits are
            `(1 - dial) * default + dial * drawn`: 0 gives the stereotype, 1 the distributions of `TABLE`.
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
    """A person or a stereotype, with an intent."""

    id: str
    intent: Intent
    traits: Traits


def person(world: World, split: str, number: int) -> Person:
    """Draws person `number` (from 0) of a split.

    Raises:
        ValueError: an unknown split, or a number below 0.
    """
    identity = _identity(PEOPLE, split, number)
    rng = _stream(world, 'traits', split, number)
    drawn = {name: row.people.draw(rng) if isinstance(row.people, Beta) else row.people for name, row in TABLE.items()}
    default = STEREOTYPES['default']
    mixed = {name: (1 - world.dial) * getattr(default, name) + world.dial * value for name, value in drawn.items()}
    return Person(identity, _draw_intent(world, split, number), Traits(**mixed))


def stereotyped(world: World, name: str, split: str, number: int) -> Person:
    """Makes a stereotype with the intent of person `number` of the split.

    Raises:
        ValueError: an unknown stereotype or split, or a number below 0.
    """
    if name not in STEREOTYPES:
        raise ValueError(f'stereotype: expected one of {tuple(STEREOTYPES)}, found {name!r}')
    return Person(_identity(name, split, number), _draw_intent(world, split, number), STEREOTYPES[name])


def person_of(world: World, identity: str) -> Person:
    """Finds a person by id, such as 'people-test-17' or 'vague-train-3'; other ids raise a ValueError."""
    name, split, number = [*identity.split('-'), '', ''][:3]
    known = name == PEOPLE or name in STEREOTYPES
    if not known or not (number.isascii() and number.isdigit()) or identity != _identity(name, split, int(number)):
        names = (PEOPLE, *STEREOTYPES)
        raise ValueError(f'person: expected an id NAME-SPLIT-NUMBER with a name of {names}, found {identity!r}')
    return person(world, split, int(number)) if name == PEOPLE else stereotyped(world, name, split, int(number))


def persona_name(seed: int) -> str:
    """Draws the stereotype that a simulator with personas plays in a conversation, uniformly."""
    return random.Random(f'persona {seed}').choice(tuple(STEREOTYPES))


def _identity(name: str, split: str, number: int) -> str:
    if split not in SPLITS:
        raise ValueError(f'split: expected one of {SPLITS}, found {split!r}')
    if number < 0:
        raise ValueError(f'number of a person: expected at least 0, found {number}')
    return f'{name}-{split}-{number}'


def _stream(world: World, use: str, split: str, number: int) -> random.Random:
    """Makes an independent random stream. Seeds are texts, which `random` hashes equally in every process."""
    return random.Random(f'{use} {world.seed} {split} {number}')


def _draw_intent(world: World, split: str, number: int) -> Intent:
    rng = _stream(world, 'intent', split, number)
    while True:  # until enough attributes matter
        values = tuple(rng.choice(a.values) if rng.random() < a.cared else ANY for a in ATTRIBUTES)
        if len(values) - values.count(ANY) >= LEAST_CARED:
            return Intent(values)
