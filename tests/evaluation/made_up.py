"""Outcomes of people who never were."""

import math

from simrl.evaluation.comparisons import claims_over_seeds
from simrl.evaluation.people import compare, outcomes_of

SCALE = 0.25 / math.log(9)


def vote(satisfaction: float, other: float) -> float:
    return 1 / (1 + math.exp((other - satisfaction) / SCALE))


def row(satisfaction: float, end: str = 'accepted', **changes):
    return {
        'satisfaction': satisfaction,
        'share_met': satisfaction,
        'left': end == 'left',
        'accepted': end == 'accepted',
        'assistant_turns': 2,
        'first_act': 'ask',
        'truncated': 0,
        'user_truncated': 0,
        **changes,
    }


def outcomes(**scores):
    """`outcomes(initial=[..], persona_1=[..])`: assistants by ARM_SEED with one satisfaction per person."""
    names = {name: name if name == 'initial' else '/seed-'.join(name.rsplit('_', 1)) for name in scores}
    return {names[name]: outcomes_of(names[name], [row(float(x)) for x in values]) for name, values in scores.items()}


def claims_of(found, people, met=None, **options):
    return claims_over_seeds(found, compare(found, vote=vote), people, met=met or {}, **options)
