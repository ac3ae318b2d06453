"""Measures of what texts have in common, plain ones on words, for screens.

Words are in small letters, without punctuation. A word's stem is its first five letters: crude, and alike for all.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SHINGLE = 4  # words in a row, by which a passage is found again
STEM = 5  # letters
# Words of no subject: of grammar, and those by which one asks for a text.
STOP = frozenset(
    WORD.findall("""
    about above after again against almost along already also although always among another anybody anyone anything
    around because become been before being below beneath beside better between both bring came come could does doing
    done down during each either else enough even ever every everybody everyone everything feel find first from further
    gave give given goes going gone good great have having help here herself himself hello however instead into itself
    just keep kind know known last later least less like likes little long look made make many maybe might more most
    much must myself need never next nobody none nothing often once only other ourselves over part people perhaps
    please quite rather really right said same seem shall should show since some somebody someone something sorry
    still such sure take tell than thank thanks that their them themselves then there these they thing things think
    this those though three through told took toward true under until upon used using very want well went were what
    whatever when where whether which while whole whom whose will with within without work would write writing written
    your yours yourself text essay paragraph sentence sentences words blog post story piece personal statement draft
    version title reader readers topic outline example ideas idea change shorter longer
    """)
)


def words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize('NFKC', text).lower())


def shingles(text: str, size: int = SHINGLE) -> set[tuple[str, ...]]:
    """All runs of so many words; of a shorter text none."""
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}


def stems(texts: Iterable[str]) -> set[str]:
    """Stems of the words of a subject."""
    return {word[:STEM] for text in texts for word in words(text) if len(word) >= 4 and word not in STOP}


def covered(text: str, sources: Sequence[str]) -> float:
    """The share of a text's words that stand in runs of `SHINGLE` words which a source has, too; 0 of no words."""
    found = words(text)
    known = set[tuple[str, ...]]().union(*map(shingles, sources)) if sources else set()
    inside = [False] * len(found)
    for i in range(len(found) - SHINGLE + 1):
        if tuple(found[i : i + SHINGLE]) in known:
            inside[i : i + SHINGLE] = [True] * SHINGLE
    return sum(inside) / len(found) if found else 0.0


def likeness(a: str, b: str) -> float:
    """From 0 to 1: the share of runs of three characters that two texts have in common (Jaccard), case apart."""
    first, second = _threes(a), _threes(b)
    both = len(first | second)
    return len(first & second) / both if both else 1.0


@functools.lru_cache(4096)  # each text is compared with many
def _threes(text: str) -> frozenset[str]:
    """All runs of three characters, from a space before the first word to one after the last."""
    padded = f' {" ".join(words(text))} '
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2))
