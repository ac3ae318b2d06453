"""Comparisons of a run's assistants, as the run's results have them.

`assistants_of_run` before anything is asked, `comparison_of` of the table in the end.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from simrl.evaluation.pairwise.responses import Pair, Responses, unit_of
from simrl.evaluation.pairwise.table import Comparison, Counted, Table
from simrl.evaluation.results.judges import JudgedComparison, JudgedPair, JudgeNumbers
from simrl.evaluation.results.measures import INITIAL, ExperimentResult
from simrl.evaluation.statistics import Estimate

T = TypeVar('T')


def assistants_of_run(responses: Mapping[str, Responses], run: ExperimentResult) -> dict[str, Responses]:
    """The responses of a run's assistants, the initial one last: win rates are then over it.

    Raises:
        ValueError: a name is no assistant's.
    """
    known = (INITIAL, *run.runs)
    if others := [name for name in responses if name not in known]:
        raise ValueError(f'--run: expected assistants of the run, {", ".join(known)}, found {others[0]!r}')
    return {name: responses[name] for name in sorted(responses, key=lambda name: name == INITIAL)}


def comparison_of(table: Table, judges: Sequence[str], pairs: Sequence[Pair]) -> JudgedComparison:
    """A table as results have it.

    Args:
        judges: their names.
        pairs: that they judged.
    """
    primary = list(table.rankings)[-1:]
    found = table.rankings[primary[0]] if primary else ''
    return JudgedComparison(
        judges=tuple(judges),
        combine=table.combine,
        unit=unit_of(pairs),
        pairs=tuple(map(_pair, table.comparisons)),
        arms=table.seeds,
        strengths={} if isinstance(found, str) else dict(zip(found.models, found.strengths, strict=True)),
    )


def _pair(of: Comparison) -> JudgedPair:
    agreement, reasons = of.agreement, dict[str, str]()
    equal: dict[str, Estimate] = {}
    votes = errors = None
    if agreement is not None:
        for two, near in agreement.equal.items():
            if (estimate := _known(near, f'agreement of {two}', reasons)) is not None:
                equal[two] = estimate
        votes = _known(agreement.votes, 'effective votes', reasons)
        errors = _known(agreement.errors, 'agreement with people', reasons)
        if votes is not None and votes.mean_correlation is None:
            votes, reasons['effective votes'] = None, 'the preferences of a judge do not vary'
    return JudgedPair(
        first=of.first,
        second=of.second,
        prompts=of.pairs,
        clusters=of.clusters,
        missing=dict(of.missing),
        empty=dict(of.empty),
        characters=dict(of.characters),
        judges={name: _numbers(counted, of.pairs) for name, counted in of.judges.items()},
        agreement=equal,
        votes=votes,
        errors=errors,
        p_value=of.p_value,
        adjusted_p=of.adjusted,
        reasons=reasons,
    )


def _numbers(of: Counted, prompts: int) -> JudgeNumbers:
    reasons: dict[str, str] = {}
    return JudgeNumbers(
        wins=of.wins,
        ties=of.ties,
        losses=of.losses,
        failures=prompts - of.wins - of.ties - of.losses,
        win_rates=_known(of.win_rates, 'win rate', reasons),
        length_controlled=_known(of.length_controlled, 'win rate at equal lengths', reasons),
        position=_known(of.position, 'position bias', reasons),
        causes=dict(of.failures),
        reasons=reasons,
    )


def _known(number: T | str | None, name: str, reasons: dict[str, str]) -> T | None:
    """A number; None of a reason in words, which is added to `reasons`."""
    if isinstance(number, str):
        reasons[name] = number
        return None
    return number
