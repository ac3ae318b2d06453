"""Outcomes of people who never were."""

import math

from simrl.evaluation.comparisons import compare_arms
from simrl.evaluation.outcomes import Outcomes, compare, outcomes_of

SCALE = 0.25 / math.log(9)
FAILURE = 'a judge failed: judge a: invalid_json'


def vote(score: float, other: float) -> float:
    return 1 / (1 + math.exp((other - score) / SCALE))


def columns(score, **changes):
    """Of one assistant, from its score on each example; None: it has none."""
    names = [f'person-{k}' for k in range(len(score))]

    def where_judged(value):
        return [None if x is None else value for x in score]

    return {
        'example': names,
        'cluster': names,
        'cause': [FAILURE if x is None else '' for x in score],
        'score': [None if x is None else float(x) for x in score],
        'share_met': [None if x is None else float(x) for x in score],
        'end': where_judged('accepted'),
        'assistant_turns': where_judged(2),
        'first_act': where_judged('ask'),
        'truncated': where_judged(0),
        'user_truncated': where_judged(0),
        **changes,
    }


def outcomes(**scores) -> dict[str, Outcomes]:
    """`outcomes(initial=[..], persona_1=[..])`: assistants by ARM_SEED with one score per person."""
    names = {name: name if name == 'initial' else '/seed-'.join(name.rsplit('_', 1)) for name in scores}
    return {names[name]: outcomes_of(names[name], columns(values)) for name, values in scores.items()}


def runs_of(found) -> dict[str, dict[int, str]]:
    """The assistants of each arm by ascending seed, arms in the order in which they first come."""
    split = {name: name.split('/seed-') for name in found if name != 'initial'}
    runs: dict[str, dict[int, str]] = {arm: {} for arm, _ in split.values()}
    for name, (arm, seed) in sorted(split.items(), key=lambda item: int(item[1][1])):
        runs[arm][int(seed)] = name
    return runs


def compared_arms(found, oracle=None, **options):
    return compare_arms(found, compare(found, vote), runs_of(found), oracle, **options)
