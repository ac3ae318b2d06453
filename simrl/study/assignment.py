"""Draws and balance: who writes which document, with which pair of models, and which reply is on the left.

All draws are keyed hashes of what is drawn for: the same after a restart, and whichever models the study has. Their key
is made from the store's secret and the study's seed, so that nobody else can compute them. Names of models are part of
no draw, so that two that are swapped change nothing else.
"""

import collections
import hmac
import itertools
import json
from collections.abc import Iterable, Sequence

from simrl.study.events import Session, Side
from simrl.study.participant import Participant
from simrl.study.settings import StudySettings

BLOCK = 6  # turns in which each model is on the left equally often
ORDERS = tuple(itertools.combinations(range(BLOCK), BLOCK // 2))  # turns of a block with the first model on the left


def draw_key(secret: bytes, seed: int) -> bytes:
    """The key of a study's draws. `secret`: of its store."""
    return hmac.digest(secret, f'draws {seed}'.encode(), 'sha256')


def draw(key: bytes, number: int, *subject: str | int) -> int:
    """One of 0 to number - 1, with equal chances: a hash with the key of what is drawn for."""
    digest = hmac.digest(key, json.dumps(subject).encode(), 'sha256')
    return int.from_bytes(digest[:8], 'big') % number


def first_is_left(key: bytes, participant: str, session: Session, turn: int) -> bool:
    """True if the reply of the pair's first model is on the left.

    Turns (from 0) are in blocks of six, each in one of the 20 orders in which either model is on the left three times.
    After each block sides are balanced within a participant, and nobody can tell an order from its first turns.
    """
    return turn % BLOCK in ORDERS[draw(key, len(ORDERS), participant, session, 'sides', turn // BLOCK)]


def kept_of_tie(key: bytes, participant: str, session: Session, turn: int) -> Side:
    """The side of the reply that both models continue from after a tie."""
    return ('left', 'right')[draw(key, 2, participant, session, 'tie', turn)]


def training_pair(settings: StudySettings, key: bytes, participant: str) -> tuple[str, str]:
    """The pair of the training exchange; it counts in no balance."""
    return settings.compared[draw(key, len(settings.compared), participant, 'training pair')]


def counts(state: Participant, now: float, gone_seconds: float) -> bool:
    """True if a participant fills a place: they completed the study, or are under way and were seen lately.

    Previews fill none. One that an administrator excluded gives theirs back, like one who left, here or on the panel.
    """
    if state.mode == 'preview' or state.is_excluded:
        return False
    if state.outcome is None:
        return now - state.seen_at <= gone_seconds and not state.has_left_panel
    return state.outcome == 'completed'


def document_type(
    settings: StudySettings,
    key: bytes,
    types: Sequence[str],
    participant: str,
    others: Iterable[Participant],
    now: float,
) -> str:
    """The type of document with the fewest participants; one of several such types is drawn.

    Args:
        key: of draws.
        types: all of the study.
        others: all participants of the study.
        now: seconds since 1970.
    """
    filled = collections.Counter(
        other.document_type for other in others if counts(other, now, settings.gone_seconds) and other.document_type
    )
    fewest = min(filled[name] for name in types)
    free = [name for name in types if filled[name] == fewest]
    return free[draw(key, len(free), participant, 'type')]


def main_pair(
    settings: StudySettings, key: bytes, state: Participant, others: Iterable[Participant], now: float
) -> tuple[str, str]:
    """The pair with the fewest participants who write the same type of document.

    Of several such pairs it is one with the fewest participants over all types; of several again one is drawn.

    Args:
        state: of the participant, whose type is known.
        key, others, now: as of `document_type`.
    """
    in_cell, in_all = collections.Counter[frozenset[str]](), collections.Counter[frozenset[str]]()
    for other in others:
        if other.main is not None and counts(other, now, settings.gone_seconds):
            pair = frozenset(other.main.pair)
            in_all[pair] += 1
            in_cell[pair] += other.document_type == state.document_type
    filled = [(in_cell[frozenset(pair)], in_all[frozenset(pair)]) for pair in settings.compared]
    free = [pair for pair, number in zip(settings.compared, filled, strict=True) if number == min(filled)]
    return free[draw(key, len(free), state.id, 'pair')]
