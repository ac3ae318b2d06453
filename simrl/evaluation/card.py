"""The card of a simulator: all that a run knows of it, in one value.

`card_of` joins the run's results with what its stages say of the simulator alone. A number that was not measured is
None, and `not_measured` has the reason, with the setting that measures it: it is never 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from simrl.evaluation.forecast import RankCorrelation
from simrl.evaluation.position import Votes
from simrl.evaluation.results.files import Added, Results
from simrl.evaluation.results.measures import Arm, ArmResult, AssistantResult, MeasureWords
from simrl.evaluation.results.simulators import SimulatorFidelity, SimulatorForecast, Transfer
from simrl.evaluation.verdicts import Verdict, verdicts_of

AGAIN = 'the command of the run does what is missing'
VERDICTS = 'verdicts of judges and people'
NO_MODEL = 'it is no model on the devices of the run'
# Purposes of stages.
MAKE, TRAIN, MEASURE = 'to make it', 'to train assistants against it', 'to measure these assistants'
MEET, COMPARE, FORECAST = 'to let all assistants meet it', 'to compare it with people', 'to forecast its utility'


@dataclasses.dataclass(frozen=True)
class Identity:
    """The simulator itself.

    Attributes:
        run: the name of the run directory.
        version: of simrl, of the run's last command.
        scene: where the experiment takes place.
        kind: the kind of its arm.
        model: the name of its model; None where it is no model, or a function of the user's own makes it.
        held_out: no assistant trains against it.
        settings: those of its arm, but for what changes no result: the address of an endpoint is in no card.
        depends_on: what its messages depend on: model, prompts, sampling, limits, dtypes; `told` is the fingerprint of
            what it is told, which is the version of its prompts.
        inputs: hashes (sha256) of the files and stages that it is made of, and of those that all of the run depends on.
    """

    run: str
    version: str
    scene: str
    kind: str
    model: str | None
    held_out: bool
    settings: Mapping[str, Any]
    depends_on: Mapping[str, Any]
    inputs: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations of the evaluation with it, those of all assistants together.

    Attributes:
        stages: that held them.
        held: their number.
        causes: how many have no score, by cause.
        ends: how many ended, by reason; of those with a score, as all that follows.
        truncated: conversations in which a message of the user reached max_new_tokens.
        counts: of the user's messages: `later_messages`, after the first; `repeated`, those of them that repeat the one
            before; `resampled`, discarded and sampled again; `missed_signals`, with the stop text, that ended nothing.
            One that not all stages counted is not among them.
    """

    stages: int
    held: int
    causes: Mapping[str, int]
    ends: Mapping[str, int]
    truncated: int
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Training:
    """The runs that train against it.

    Attributes:
        runs: their number.
        lines: logged lines of all runs.
        rates: means over these lines, by the name of the metric; of a metric that no line has there is none.
        usage: sums over the steps, by endpoint and name: tries, tokens, cost in the currency of the prices.
    """

    runs: int
    lines: int
    rates: Mapping[str, float]
    usage: Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of the stages that it takes part in, by purpose and stage; those of `unfinished` have none yet."""

    seconds: Mapping[str, Mapping[str, float]]
    unfinished: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about one simulator, of a run's stages."""

    identity: Identity
    conversations: Conversations | None  # None where none were held
    training: Training | None  # None where no run is finished
    cost: Cost


@dataclasses.dataclass(frozen=True)
class MeasureUtility:
    """The assistants that trained against it, on one measure."""

    words: MeasureWords
    examples: int
    clusters: int
    arm: ArmResult
    assistants: dict[str, AssistantResult]
    votes: Votes | None  # that a panel of judges is worth, whose own scores are parts; None without one


@dataclasses.dataclass(frozen=True)
class Met:
    """An assistant's conversations with it; the interval is over conversations: of this checkpoint only."""

    mean: float
    low: float | None
    high: float | None
    conversations: int
    failed: int


@dataclasses.dataclass(frozen=True)
class CardTransfer:
    """The simulator in the matrix; `score` times `times` is what reports show."""

    score: str
    times: int
    gains: Transfer | None  # of its assistants, with each simulator; None for a held-out one
    met: dict[str, Met] | None  # every assistant with it; None for people


@dataclasses.dataclass(frozen=True)
class CardForecast:
    """Forecasts of its utility, before anything was trained against it; see `ForecastResult`."""

    people: str  # what stands for people
    examples: int
    samples: int
    n: int
    own: SimulatorForecast
    correlations: tuple[RankCorrelation, ...]  # of such forecasts with the utility that came out, over the run's arms


@dataclasses.dataclass(frozen=True)
class SimulatorCard:
    """card.json.

    Attributes:
        name: its arm.
        parameters: of its model; None where it is not on the devices of the run.
        utility: by measure, the headline first; None without an assistant that trained against it.
        verdicts: of judges and people on assistants that trained against it.
        fidelity: None where it was not measured.
        people: rates of people's messages, beside those of `fidelity`.
        not_measured: by number, the reason.
        caution: what the numbers do not show.
    """

    name: str
    identity: Identity
    parameters: int | None
    utility: dict[str, MeasureUtility] | None
    verdicts: tuple[Verdict, ...]
    transfer: CardTransfer | None
    fidelity: SimulatorFidelity | None
    people: dict[str, float | None]
    forecast: CardForecast | None
    conversations: Conversations | None
    training: Training | None
    cost: Cost
    not_measured: dict[str, str]
    caution: str


def card_of(name: str, results: Results, facts: Facts, added: Added | None = None) -> SimulatorCard:
    """The card of the simulator of an arm.

    Args:
        name: the arm.
        results: those of its run, or of what of it is done.
        facts: of the same run.
        added: what tools have added to it; None: nothing.

    Raises:
        ValueError: the results have no such arm.
    """
    if name not in results.experiment.arms:
        raise ValueError(f'card: expected one of {", ".join(results.experiment.arms)}, found {name!r}')
    not_measured: dict[str, str] = {}
    card = SimulatorCard(
        name=name,
        identity=facts.identity,
        parameters=results.experiment.arms[name].parameters,
        utility=_utility(name, results, not_measured),
        verdicts=tuple(verdict for verdict in verdicts_of(added or Added()) if verdict.about(name)),
        transfer=_transfer(name, results, not_measured),
        fidelity=_fidelity(name, results, facts.cost, not_measured),
        people=results.fidelity.people,
        forecast=_forecast(name, results, facts.cost, not_measured),
        conversations=facts.conversations,
        training=facts.training,
        cost=facts.cost,
        not_measured=not_measured,
        caution=results.experiment.caution,
    )
    if not card.verdicts and not results.experiment.arms[name].held_out:
        not_measured[VERDICTS] = 'no tool has left any in the run: tools.win_rate, tools.wildbench, tools.study_report'
    _about_failures(facts, results.experiment.arms[name], not_measured)
    return card


def _utility(name: str, results: Results, missing: dict[str, str]) -> dict[str, MeasureUtility] | None:
    arm = results.experiment.arms[name]
    if arm.held_out:
        missing['utility'] = 'no assistant trains against it: it is one of config.held_out_simulators'
        return None
    assistants = results.experiment.assistants_of(name)
    if not assistants:
        missing['utility'] = f'no assistant is trained against it and measured yet: {AGAIN}'
        return None
    if len(assistants) == 1:
        missing['utility over training seeds'] = 'there is one seed, of which no interval is known: config.seeds'
    found = {
        key: MeasureUtility(
            measure.words,
            measure.examples,
            measure.clusters,
            measure.arms[name],
            {assistant: measure.assistants[assistant] for assistant in assistants},
            measure.votes,
        )
        for key, measure in results.measures.items()
    }
    recovered = [measure.arm.gap_recovered for measure in found.values()]
    if all(gap is None for gap in recovered):
        missing['gap recovered'] = 'no assistant trains against people themselves'
    for gap in recovered:
        if gap is not None and gap.mean is None:
            missing['gap recovered'] = gap.reason or 'it is undefined'
    return found


def _transfer(name: str, results: Results, missing: dict[str, str]) -> CardTransfer | None:
    found, arm = results.matrix, results.experiment.arms[name]
    if found is None:
        missing['transfer'] = f'no assistant has met all simulators yet, or there is none to meet: {AGAIN}'
        return None
    gains = found.transfers.get(name)
    if gains is None and not arm.held_out:
        missing['transfer'] = f'none of its assistants has met all simulators yet: {AGAIN}'
    if gains is not None:
        if gains.other_kinds is None:
            missing['transfer to other kinds'] = 'the run has no simulator of another kind: config.arms'
        if gains.held_out is None:
            missing['transfer to held-out simulators'] = 'the run holds none out: config.held_out_simulators'
    if name not in found.users:
        if not arm.oracle:
            missing['assistants with it'] = f'not all assistants have met it yet: {AGAIN}'
        return CardTransfer(found.score, found.times, gains, None)
    row = found.users.index(name)
    failed = found.failed[row] if found.failed else [0] * len(found.assistants)
    cells = zip(found.mean[row], found.low[row], found.high[row], found.conversations[row], failed, strict=True)
    met = {assistant: Met(*cell) for assistant, cell in zip(found.assistants, cells, strict=True)}
    return CardTransfer(found.score, found.times, gains, met)


def _fidelity(name: str, results: Results, cost: Cost, missing: dict[str, str]) -> SimulatorFidelity | None:
    if results.experiment.arms[name].oracle:
        missing['fidelity'] = 'its messages are those of people themselves'
        return None
    found = results.fidelity.simulators.get(name)
    if found is None:
        missing['fidelity'] = f'it has not predicted people’s messages yet: {AGAIN}'
        return None
    if found.perplexity is None:
        texts = 'there is none under a simulator that is met through its texts'
        missing['perplexity'] = f'its stage is not finished: {AGAIN}' if COMPARE in cost.unfinished else texts
    if not found.replayed:
        nothing = 'the run replays no conversations of people: config.evaluation.replayed'
        missing['distances from people'] = f'not finished: {AGAIN}' if COMPARE in cost.unfinished else nothing
    for source, measured in found.replayed.items():
        missing.update({f'{what} ({source})': why for what, why in measured.not_measured.items()})
    met = results.matrix is not None and name in results.matrix.users
    for rate, value in found.statistics.items():
        if value is None:
            missing[rate] = 'it said nothing of which this is a rate' if met else f'not met yet: {AGAIN}'
    return found


def _forecast(name: str, results: Results, cost: Cost, missing: dict[str, str]) -> CardForecast | None:
    found = results.forecast
    if results.experiment.arms[name].oracle:
        missing['forecast'] = 'people are what simulators are compared with'
        return None
    if found is None or name not in found.simulators:
        nothing = 'the run forecasts nothing: config.evaluation.forecast'
        missing['forecast'] = f'it is not finished: {AGAIN}' if FORECAST in cost.unfinished else nothing
        return None
    own = found.simulators[name]
    for words, kind, estimate in (
        ('forecast by gradients', 'cosine', own.cosine),
        ('forecast by best of n', 'best_of_n', own.best_of_n),
    ):
        if estimate is None:
            missing[words] = own.reason or 'too few replies have both a reward and a value'
        if all(x.mean is None for x in found.correlations if x.forecast == kind):
            why = 'fewer than three arms have it and a utility, or either is the same for all'
            missing[f'rank correlation of the {words}'] = why
    return CardForecast(found.people, found.examples, found.samples, found.n, own, found.correlations)


def _about_failures(facts: Facts, arm: Arm, missing: dict[str, str]) -> None:
    if facts.conversations is None:
        missing['failures in the evaluation'] = (
            'people are no simulator of the matrix' if arm.oracle else f'no finished stage with it is here: {AGAIN}'
        )
    elif 'missed_signals' not in facts.conversations.counts:
        missing['missed end signals in the evaluation'] = (
            'it ends a conversation by no text, or its stages are of an earlier version'
        )
    if facts.training is None and not facts.identity.held_out:
        missing['failures in training'] = f'no finished training against it is here: {AGAIN}'
    if not facts.identity.inputs:
        missing['hashes of inputs'] = f'no stage that reads them is here: {AGAIN}'
    if arm.parameters is None and not arm.oracle:
        missing['parameters'] = f'its size is not known: {NO_MODEL}'
