"""Texts as counts: a text's words, their lengths, its marks. `distances` compares the counts of two sets of texts.

The features are those of App. I.1 of arXiv:2605.09808, after Ivey et al. (2024, arXiv:2409.08330). Neither defines
them so far that numbers would compare: the definitions here are those of the functions' docstrings.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np

from simrl.evaluation.fidelity.annotators import IsWord, Sentiment, Tag

Counts = collections.Counter[Hashable]
Count = Callable[[str], Counts]
Kind = Literal['mean', 'distribution']

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
TOKEN = re.compile(r"\w+?(?=n't\b)|n't\b|'\w+|\w+|[^\w\s]")  # as the BNC has them: do n't, I 'm
LONGEST = 24  # letters of a word that are tagged
TOTAL, NUMBER = 'total', 'number'  # the counts of a mean
NEUTRAL = 0.05  # compound scores nearer to 0 are neutral (Hutto & Gilbert 2014)


@dataclasses.dataclass(frozen=True)
class Feature:
    """A way of counting texts.

    Attributes:
        kind: 'mean': two sets of texts are as far apart as their means, total / number (L1); 'distribution': as the
            shares of their counts (Jensen-Shannon divergence).
        counter: an annotator -> the function that counts a text.
        annotator: field of `Annotators`; '': it needs none, and `counter` is called with None.
    """

    kind: Kind
    counter: Callable[[Any], Count]
    annotator: str = ''


def word_length(_: None) -> Count:
    """Letters of a word."""

    def count(text: str) -> Counts:
        words = WORD.findall(text)
        return collections.Counter({TOTAL: sum(map(len, words)), NUMBER: len(words)})

    return count


def utterance_length(_: None) -> Count:
    """Words of a message, between white space, in bins of half an octave: 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-22, ..."""
    return lambda text: collections.Counter([math.floor(2 * math.log2(max(len(text.split()), 1)))])


def typo_rate(is_word: IsWord) -> Count:
    """Share of words in lower case that the dictionary does not have: others may be names, or of a program."""

    def count(text: str) -> Counts:
        words = [word for word in WORD.findall(text) if word.islower()]
        return collections.Counter({TOTAL: sum(not is_word(word) for word in words), NUMBER: len(words)})

    return count


def parts_of_speech(tag: Tag) -> Count:
    """Tags of words and marks. Of a long word the first letters are read: a tagger's time grows with their square."""

    def count(text: str) -> Counts:
        tokens = [token[:LONGEST] for token in TOKEN.findall(text.replace('’', "'"))]
        return collections.Counter(tag(tokens) if tokens else ())

    return count


def punctuation(_: None) -> Count:
    """The mark that each word ends in, if any; words are what is between white space."""
    return lambda text: collections.Counter('' if word[-1].isalnum() else word[-1] for word in text.split())


def capitalisation(_: None) -> Count:
    """Words in lower case, in capitals, with a first capital, or otherwise; first words of a message apart."""

    def kind(word: str) -> str:
        if word.islower():
            return 'lower'
        if word.isupper() and len(word) > 1:
            return 'capitals'
        return 'first capital' if word[0].isupper() and (word[1:].islower() or len(word) == 1) else 'mixed'

    def count(text: str) -> Counts:
        return collections.Counter((number == 0, kind(word)) for number, word in enumerate(WORD.findall(text)))

    return count


def sentiment(score: Sentiment) -> Count:
    """Messages that are negative, neutral or positive."""

    def count(text: str) -> Counts:
        found = score(text)
        return collections.Counter([int(found >= NEUTRAL) - int(found <= -NEUTRAL)])

    return count


FEATURES = {
    'word length': Feature('mean', word_length),
    'utterance length': Feature('distribution', utterance_length),
    'typo rate': Feature('mean', typo_rate, 'words'),
    'part of speech': Feature('distribution', parts_of_speech, 'tags'),
    'punctuation': Feature('distribution', punctuation),
    'capitalisation': Feature('distribution', capitalisation),
    'sentiment': Feature('distribution', sentiment, 'sentiment'),
}


def count_table(counts: Sequence[Sequence[Counts]], rows: np.ndarray) -> list[np.ndarray]:
    """Sums of counts, float64 `[C, K]` for each of several lists of texts, with the same columns.

    Args:
        counts: of each list, one for each of its N texts.
        rows: int `[N]`, the row that each text is counted in.
    """
    columns: dict[Hashable, int] = {key: column for column, key in enumerate((TOTAL, NUMBER))}
    for key in (key for texts in counts for text in texts for key in text):
        columns.setdefault(key, len(columns))
    tables = [np.zeros((int(rows.max()) + 1, len(columns))) for _ in counts]
    for table, texts in zip(tables, counts, strict=True):
        for row, text in zip(rows, texts, strict=True):
            for key, value in text.items():
                table[row, columns[key]] += value
    return tables
