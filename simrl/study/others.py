"""Texts of a participant that another one has written, too: one person with two accounts, or a text from elsewhere."""

import collections
import dataclasses
from collections.abc import Collection, Mapping

from simrl.study.overlap import SHINGLE, shingles
from simrl.study.participant import Participant
from simrl.study.texts import Tasks

Run = tuple[str, ...]  # of words


@dataclasses.dataclass(frozen=True)
class Others:
    """Runs of words in what each participant wrote.

    Attributes:
        texts: of each participant's long texts the runs that stand neither in a reply that they were shown nor in a
            task; texts that are quoted for the greater part are left out.
        writers: participants by run, of runs that several have.
    """

    texts: Mapping[str, tuple[frozenset[Run], ...]]
    writers: Mapping[Run, Collection[str]]

    def like(self, participant: str, share: float) -> str | None:
        """Says whose text one of a participant's is, where another has at least such a share of its runs."""
        for own in self.texts.get(participant, ()):
            counts = collections.Counter(id for run in own for id in self.writers.get(run, ()) if id != participant)
            if counts and (most := counts.most_common(1)[0])[1] >= share * len(own):
                return f'{most[1]} of {len(own)} runs of {SHINGLE} words in a text are those of {most[0]}'
        return None


def runs_of_tasks(tasks: Tasks) -> set[Run]:
    """The runs of words in all tasks."""
    return shingles('\n'.join(task.brief for own in tasks.types for task in own.tasks))


def runs_of(participant: Participant, of_tasks: set[Run], least_words: int) -> tuple[frozenset[Run], ...]:
    """A participant's entry in `Others.texts`.

    Args:
        least_words: of a text that is compared; short messages are often alike.
    """
    turns = participant.main.turns if participant.main else ()
    written = [turn.message for turn in turns] + ([participant.wrote.text] if participant.wrote else [])
    known = of_tasks.union(*(shingles(text) for turn in turns for text in turn.shown))
    runs = [(shingles(text), frozenset(shingles(text) - known)) for text in written]
    return tuple(own for all_, own in runs if len(own) > max(least_words - SHINGLE, len(all_) / 2))


def others_of(texts: Mapping[str, tuple[frozenset[Run], ...]]) -> Others:
    """Finds the writers of runs. `texts`: of all participants, by id, as of `runs_of`."""
    seen: set[Run] = set()
    shared: set[Run] = set()
    own = {id: frozenset[Run]().union(*runs) for id, runs in texts.items()}
    for runs in own.values():
        shared |= seen & runs
        seen |= runs
    writers: dict[Run, set[str]] = collections.defaultdict(set)
    for id, runs in own.items():
        for run in runs & shared:
            writers[run].add(id)
    return Others(texts, writers)
