"""Draws and balance: who writes which document, with which pair of models, and which reply is on the left.

All draws are hashes of the study's seed and of what is drawn for: the same after a restart, and whichever models the
study has. Names of models are part of no draw, so that two that are swapped change nothing else.
"""

import collections
import hashlib
import json
from collections.abc import Iterable, Sequence

from simrl.study.events import Session, Side
from simrl.study.participant import Participant
from simrl.study.settings import StudySettings


def draw(seed: int, number: int, *subject: str | int) -> int:
    """One of 0 to number - 1, with equal chances: a hash of the seed and of what is drawn for."""
    digest = hashlib.sha256(json.dumps([seed, *subject]).encode()).digest()
    return int.from_bytes(digest[:8], 'big') % number


def first_is_left(seed: int, participant: str, session: Session, turn: int) -> bool:
    """True if the reply of the pair's first model is on the left.

    Turns (from 0) are in blocks of two: of the first the side is drawn, the second has the other. After an even number
    of turns each model of a participant's pair was on the left as often as on the right.
    """
    return bool(draw(seed, 2, participant, session, 'side', turn // 2)) != bool(turn % 2)


def kept_of_tie(seed: int, participant: str, session: Session, turn: int) -> Side:
    """The side of the reply that both models continue from after a tie."""
    return ('left', 'right')[draw(seed, 2, participant, session, 'tie', turn)]


def training_pair(settings: StudySettings, participant: str) -> tuple[str, str]:
    """The pair of the training exchange; it counts in no balance."""
    return settings.compared[draw(settings.seed, len(settings.compared), participant, 'training pair')]


def counts(state: Participant, now: float, gone_seconds: float) -> bool:
    """True if a participant fills a place: they completed the study, or are under way and were seen lately.

    Previews fill none. One that an administrator excluded gives theirs back, like one who left.
    """
    if state.mode == 'preview' or state.is_excluded:
        return False
    return state.outcome == 'completed' or (state.outcome is None and now - state.seen_at <= gone_seconds)


def document_type(
    settings: StudySettings, types: Sequence[str], participant: str, others: Iterable[Participant], now: float
) -> str:
    """The type of document with the fewest participants; one of several such types is drawn.

    Args:
        types: all of the study.
        others: all participants of the study.
        now: seconds since 1970.
    """
    filled = collections.Counter(
        other.document_type for other in others if counts(other, now, settings.gone_seconds) and other.document_type
    )
    fewest = min(filled[name] for name in types)
    free = [name for name in types if filled[name] == fewest]
    return free[draw(settings.seed, len(free), participant, 'type')]


def main_pair(
    settings: StudySettings, state: Participant, others: Iterable[Participant], now: float
) -> tuple[str, str]:
    """The pair with the fewest participants who write the same type of document.

    Of several such pairs it is one with the fewest participants over all types; of several again one is drawn.

    Args:
        state: of the participant, whose type is known.
        others, now: as of `document_type`.
    """
    in_cell, in_all = collections.Counter[frozenset[str]](), collections.Counter[frozenset[str]]()
    for other in others:
        if other.main is not None and counts(other, now, settings.gone_seconds):
            pair = frozenset(other.main.pair)
            in_all[pair] += 1
            in_cell[pair] += other.document_type == state.document_type
    filled = [(in_cell[frozenset(pair)], in_all[frozenset(pair)]) for pair in settings.compared]
    free = [pair for pair, number in zip(settings.compared, filled, strict=True) if number == min(filled)]
    return free[draw(settings.seed, len(free), state.id, 'pair')]
