"""All measures of a simulator's replayed turns beside people's, or of people's turns alone, for each source.

No single data set is "the" people: measures are for each source, and for all together with as many conversations of
each in both halves.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from simrl.evaluation.fidelity import behaviour
from simrl.evaluation.fidelity.annotators import Annotators, Embed, MissingPackageError
from simrl.evaluation.fidelity.behaviour import Termination
from simrl.evaluation.fidelity.distances import (
    Between,
    Distance,
    count_distance,
    distance,
    distance_sums,
    energy_distance,
)
from simrl.evaluation.fidelity.features import FEATURES, Count, count_table
from simrl.evaluation.fidelity.turns import Turn, paired
from simrl.evaluation.shares import cluster_shares
from simrl.evaluation.statistics import Estimate, cluster_bootstraps, cluster_numbers

ALL = 'all sources'  # all together, where there are several
EMBEDDING = 'sentence embedding'
AS_ASSISTANT, EARLY_END = 'speaks as an assistant', 'ends where the person went on'
CUT = 'cut by its budget'
OVERLAP, LEAK, COVERAGE = 'intent overlap', 'intent leaked', 'intent covered'
DIVERSITY, MEANING = 'diversity of openings', 'cosine distance to the real message'


@dataclasses.dataclass(frozen=True)
class Rate:
    """A number of a simulator's turns, and the same of people's, with intervals over conversations."""

    people: Estimate | None
    simulated: Estimate | None


@dataclasses.dataclass(frozen=True)
class SourceFidelity:
    """A simulator beside people of one source, or these people alone.

    Attributes:
        num_turns, num_conversations: turns of people, those left out of distances as well.
        num_compared: turns that distances are of.
        left_out: turns that they are not of, by reason.
        distances: by the name of `FEATURES`, and `EMBEDDING`.
        rates: `AS_ASSISTANT`, `CUT`: share of messages; `OVERLAP`, `LEAK`: of messages of people with an intent;
            `COVERAGE`: of their conversations; `EARLY_END`: share of turns with which the person did not end;
            `DIVERSITY`: of openings, where the simulator writes them; `MEANING`: of the embeddings of a turn, beside
            people's messages of other conversations, which is what chance gives.
        termination: None where no natural end was replayed.
        ends_unknown, ends_incomplete: conversations without a natural end, and those in which not all was replayed.
        not_measured: by name, the reason.
    """

    num_turns: int
    num_conversations: int
    num_compared: int
    left_out: dict[str, int]
    distances: dict[str, Distance]
    rates: dict[str, Rate]
    termination: Termination | None
    ends_unknown: int
    ends_incomplete: int
    not_measured: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Tools:
    """The annotators that could be made; a text is described once.

    Attributes:
        counts: by feature, the function that counts a text.
        embed: None without one.
        missing: by feature, why there is none.
    """

    counts: Mapping[str, Count]
    embed: Embed | None
    missing: Mapping[str, str]


def make_tools(annotators: Annotators) -> Tools:
    """Makes the annotators that are installed.

    Raises:
        ValueError: one is named that is not there.
    """
    counts: dict[str, Count] = {}
    missing: dict[str, str] = {}
    for name, feature in FEATURES.items():
        try:
            made = annotators.make(feature.annotator) if feature.annotator else None
        except MissingPackageError as error:
            missing[name] = str(error)
        else:
            counts[name] = functools.cache(feature.counter(made))
    embed = None
    try:
        embed = _each_once(annotators.make('embeddings'))
    except MissingPackageError as error:
        missing[EMBEDDING] = str(error)
    return Tools(counts, embed, missing)


def _each_once(embed: Embed) -> Embed:
    """The function that embeds equal texts once."""
    found: dict[str, np.ndarray] = {}

    def cached(texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            found.update(zip(new, embed(new), strict=True))
        return np.stack([found[text] for text in texts])

    return cached


def measure(turns: Sequence[Turn], tools: Tools, *, seed: int = 0) -> dict[str, SourceFidelity]:
    """Measures replayed turns, by source; with several sources, all of them together come first.

    Args:
        turns: of one simulator, or of people alone: then no turn has a simulator's.
        seed: of halves and resamples.

    Raises:
        ValueError: there is no turn, or only some are people's alone.
    """
    if not turns:
        raise ValueError('expected turns of people, found none')
    alone = {not turn.replayed and not turn.failure for turn in turns}
    if len(alone) > 1:
        raise ValueError('expected turns of a simulator or of people alone, found both')
    sources = dict.fromkeys(turn.source for turn in turns)
    groups = {ALL: list(turns)} if len(sources) > 1 else {}
    groups |= {source: [turn for turn in turns if turn.source == source] for source in sources}
    return {name: _measure(own, tools, alone == {True}, seed) for name, own in groups.items()}


def _measure(turns: Sequence[Turn], tools: Tools, alone: bool, seed: int) -> SourceFidelity:
    compared, left_out = paired(turns)
    missing = dict(tools.missing)
    distances: dict[str, Distance] = {}
    conversations = len({turn.conversation for turn in compared})
    if conversations < 2:
        reason = f'expected at least 2 conversations to compare, found {conversations}'
        missing |= dict.fromkeys((*tools.counts, *([EMBEDDING] if tools.embed else [])), reason)
    else:
        for name, found in _distances(compared, tools, alone, seed).items():
            if np.isfinite([found.people, *([] if found.simulated is None else [found.simulated])]).all():
                distances[name] = found
            else:
                missing[name] = 'no half has anything to count'
    ends, unknown, incomplete = (None, 0, 0) if alone else behaviour.termination(turns, seed=seed)
    if ends is None and not alone:
        missing['ends'] = 'no conversation with a natural end was replayed to its end'
    return SourceFidelity(
        num_turns=len(turns),
        num_conversations=len({turn.conversation for turn in turns}),
        num_compared=len(compared),
        left_out=left_out,
        distances=distances,
        rates=_rates(turns, compared, tools, alone, seed),
        termination=ends,
        ends_unknown=unknown,
        ends_incomplete=incomplete,
        not_measured=missing,
    )


def _texts(turns: Sequence[Turn], alone: bool) -> list[list[str]]:
    """Texts of people, and, unless they are alone, of the simulator."""
    said = [[turn.real or '' for turn in turns]]
    return said if alone else [*said, [turn.simulated or '' for turn in turns]]


def _distances(turns: Sequence[Turn], tools: Tools, alone: bool, seed: int) -> dict[str, Distance]:
    rows = cluster_numbers([turn.conversation for turn in turns])
    source_of = {turn.conversation: turn.source for turn in turns}
    texts = _texts(turns, alone)

    def found(people: Between, simulated: Between | None) -> Distance:
        return distance(people, simulated, list(source_of.values()), seed=seed)

    distances = {}
    for name, count in tools.counts.items():
        kind = FEATURES[name].kind
        people, *simulated = count_table([list(map(count, said)) for said in texts], rows)
        distances[name] = found(
            count_distance(kind, people, people),
            None if alone else count_distance(kind, simulated[0], people),
        )
    if tools.embed is not None:
        number = np.bincount(rows).astype(np.float64)
        real, *said = map(tools.embed, texts)
        within = distance_sums(real, real, rows)
        simulated_from = None
        if not alone:
            across, own = distance_sums(said[0], real, rows), distance_sums(said[0], said[0], rows)
            simulated_from = energy_distance(across, own, within, number)
        distances[EMBEDDING] = found(energy_distance(within, within, within, number), simulated_from)
    return distances


def _rates(turns: Sequence[Turn], compared: Sequence[Turn], tools: Tools, alone: bool, seed: int) -> dict[str, Rate]:
    rates: dict[str, Rate] = {}
    clusters = [turn.conversation for turn in compared]
    if compared:
        said = [[behaviour.speaks_as_assistant(text) for text in texts] for texts in _texts(compared, alone)]
        rates[AS_ASSISTANT] = _rate(cluster_shares([list(map(float, values)) for values in said], clusters))
        if not alone:
            cut = cluster_shares([[float(turn.truncated) for turn in compared]], clusters)
            rates[CUT] = Rate(None, cut[0])
    told = [turn for turn in compared if turn.intent is not None]
    if told:
        rates |= _intent_rates(told, alone, seed)
    went_on = [turn for turn in turns if turn.replayed and turn.real_end is False]
    if went_on:
        ended = cluster_shares([[float(bool(turn.ended)) for turn in went_on]], [x.conversation for x in went_on])
        rates[EARLY_END] = Rate(None, ended[0])
    openings = [turn for turn in compared if turn.turn == 0]
    own = [turn.conversation for turn in openings]
    if len(set(own)) > 1:
        found = [behaviour.diversity(texts, own, seed=seed) for texts in _texts(openings, alone)]
        rates[DIVERSITY] = _rate(found)
    if tools.embed is not None and not alone and len(set(clusters)) > 1:
        real, said_instead = (tools.embed(texts).astype(np.float64) for texts in _texts(compared, alone))
        rows = cluster_numbers(clusters)
        of_conversation = np.zeros((int(rows.max()) + 1, real.shape[1]))
        np.add.at(of_conversation, rows, real)
        others = len(rows) - np.bincount(rows)[rows]
        chance = 1 - np.sum(real * (real.sum(axis=0) - of_conversation[rows]), axis=1) / others
        apart = 1 - np.sum(real * said_instead, axis=1)
        rates[MEANING] = _rate(cluster_bootstraps([chance, apart], clusters, seed=seed))
    return rates


def _intent_rates(turns: Sequence[Turn], alone: bool, seed: int) -> dict[str, Rate]:
    clusters, texts = [turn.conversation for turn in turns], _texts(turns, alone)

    def each(of: Callable[[str, str], float]) -> list[list[float]]:
        return [[float(of(text, turn.intent or '')) for text, turn in zip(said, turns, strict=True)] for said in texts]

    # A conversation that several trainings of a simulator replayed comes as often.
    starts = [i for i, turn in enumerate(turns) if i == 0 or not _follows(turns[i - 1], turn)]
    pieces = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(turns)], strict=True)]
    covered = [
        [behaviour.intent_coverage(said[piece], turns[piece.start].intent or '') for piece in pieces] for said in texts
    ]
    return {
        OVERLAP: _rate(cluster_bootstraps(each(behaviour.intent_overlap), clusters, seed=seed)),
        LEAK: _rate(cluster_shares(each(behaviour.leaks_intent), clusters)),
        COVERAGE: _rate(cluster_bootstraps(covered, [clusters[piece.start] for piece in pieces], seed=seed)),
    }


def _follows(before: Turn, turn: Turn) -> bool:
    return before.conversation == turn.conversation and before.turn < turn.turn


def _rate(found: Sequence[Estimate]) -> Rate:
    """People's estimate, and the simulator's unless people are alone."""
    return Rate(found[0], found[1] if len(found) > 1 else None)
