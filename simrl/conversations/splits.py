"""Splits by a hash of who or what is split, so that the order of the data does not matter."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from simrl.conversations.records import SPLITS


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """Shares of the splits; the rest is the split train."""

    dev: float = 0.05
    test: float = 0.06
    seed: int = 42

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ('dev', 'test'):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f'{name}.{field}: expected a share of 0 to below 1, found {getattr(self, field)}')
        if self.dev + self.test >= 1:
            raise ValueError(f'{name}.test: expected dev + test below 1, found {self.dev} + {self.test}')


@dataclasses.dataclass(frozen=True)
class UserSplits(SplitSettings):
    """Shares of the users of each country."""

    # One user: everybody behind a hashed IP address, in whatever countries; or, as in the paper's code, behind an
    # address in one country: then a person in two countries is two users, and may be in two splits.
    user: Literal['hashed_ip', 'hashed_ip+country'] = 'hashed_ip'


def hash64(text: str) -> int:
    """A hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest())


def split_of(key: int, settings: SplitSettings) -> str:
    """The split of all that has one key, such as one opening; it depends on nothing else."""
    position = hash64(f'{settings.seed} {key}') / 2**64
    return 'test' if position < settings.test else 'dev' if position < settings.test + settings.dev else 'train'


def split_users(address: np.ndarray, country: np.ndarray, countries: Sequence[str], settings: UserSplits) -> np.ndarray:
    """Splits rows by user, stratified by country; neither the order of rows nor that of names matters.

    The users of a country are sorted by a hash of seed and address. The first are tested on, the next are for
    development; where the shares end depends on a hash of the country, so that small countries are not all trained on.
    A user of several countries counts for the one with most rows, of equal ones the first by name.

    Args:
        address: uint64 [rows].
        country: uint16 [rows], indices into `countries`.

    Returns:
        An index into SPLITS of each row, int8 [rows].
    """
    order = np.argsort(countries)
    rank = np.empty(len(countries), np.int64)
    rank[order] = np.arange(len(countries))
    names = [countries[i] for i in order]
    country = rank[country]
    user = address
    if settings.user == 'hashed_ip+country':
        user = mix(address + np.array([hash64(name) for name in names], np.uint64)[country])
    users, row_user = np.unique(user, return_inverse=True)
    pairs, rows_of_pair = np.unique(np.stack([row_user, country]), axis=1, return_counts=True)
    best = np.lexsort((pairs[1], -rows_of_pair, pairs[0]))
    _, first = np.unique(pairs[0][best], return_index=True)
    country_of_user = pairs[1][best][first]

    key = mix(users ^ np.uint64(hash64(f'seed {settings.seed}')))
    by_country = np.lexsort((key, country_of_user))
    strata, begin, size = np.unique(country_of_user[by_country], return_index=True, return_counts=True)
    offset = np.array([hash64(f'{settings.seed} {names[stratum]}') / 2**64 for stratum in strata])
    position = np.empty(len(users))
    which = np.repeat(np.arange(len(strata)), size)
    position[by_country] = (np.arange(len(users)) - begin[which] + offset[which]) / size[which]
    bounds = (('test', settings.test), ('dev', settings.test + settings.dev), ('train', np.inf))
    splits = np.array([SPLITS.index(name) for name, _ in bounds], np.int8)
    split_of_user = splits[np.searchsorted([bound for _, bound in bounds], position, 'right')]
    return split_of_user[row_user]


def mix(values: np.ndarray) -> np.ndarray:
    """Maps uint64 one to one to numbers whose bits all depend on all bits (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
