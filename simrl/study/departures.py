"""The plan that was frozen, the look at results that an analysis is, and where both depart from each other.

1. `frozen_plan`: the plan that holds, from the store.
2. `look_at`: the look that is open, or was made. Results by model are seen at planned looks, or the report says so.
3. `departures`: sentences.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from simrl.run.config import differences, to_dict
from simrl.study.events import Arrived, Excluded, Looked, Opened, PlanFrozen, Stored
from simrl.study.participant import fold_all
from simrl.study.plan import frozen_settings, is_finished, next_look
from simrl.study.settings import Mode, PlanSettings


class NoLookError(ValueError):
    """No look is planned by now, and no reason is given for one that is not planned."""


@dataclasses.dataclass(frozen=True)
class Look:
    """A look at results by model.

    Attributes:
        kind: `planned`: open now; `made`: a planned one of before, whose results are shown again; `unplanned`;
            `rehearsal`: of a study that has no looks.
        completed: participants who had completed then and are not excluded.
        shares: of the planned participants at planned looks, this one last; of one that is not planned as if it were
            the end.
        alpha: two-sided, of one pair, that it spends.
        until: number of the last event that counts; None: all do, also those after the end of the study.
    """

    kind: Literal['planned', 'made', 'unplanned', 'rehearsal']
    completed: int
    shares: tuple[float, ...]
    alpha: float = 0.0
    until: int | None = None


def frozen_plan(events: Iterable[Stored]) -> PlanFrozen | None:
    """The plan at the first consent; None before it."""
    return next((stored.event for stored in events if isinstance(stored.event, PlanFrozen)), None)


def look_at(events: Sequence[Stored], plan: PlanSettings, mode: Mode, reason: str = '') -> Look:
    """The look that a report is.

    Args:
        events: of the store.
        reason: for a look that is not planned.

    Raises:
        NoLookError: none is open or was made, and there is no reason for another.
    """
    completed = _completed(events, mode)
    if mode != 'live':
        return Look('rehearsal', completed, (1.0,))
    frozen = frozen_plan(events)
    pairs = len(frozen.plan['pairs']) if frozen else 1
    looked = [(stored.number, stored.event) for stored in events if isinstance(stored.event, Looked)]
    made = [(number, look) for number, look in looked if look.planned]
    shares = tuple(min(1.0, look.participants / plan.participants) for _, look in made)
    if (bound := next_look(plan, pairs, completed, [look for _, look in looked])) is not None:
        return Look('planned', completed, (*shares, bound.share), bound.alpha)
    if reason.strip() and not is_finished(plan, [look for _, look in made]):
        return Look('unplanned', completed, (1.0,))  # no alpha is left for it
    if made:
        number, look = made[-1]
        until = None if is_finished(plan, [look]) else number
        return Look('made', _completed(counted(events, until), mode), shares, look.alpha, until)
    raise NoLookError(
        f'expected {min((*plan.looks, 1.0)):.0%} of the {plan.participants} planned participants before results by '
        f'model are seen, found {completed} who completed; a reason makes it a look that departs from the plan'
    )


def is_stored(look: Look, events: Iterable[Stored]) -> bool:
    """True if the last look that the store has is this one."""
    last = [stored.event for stored in events if isinstance(stored.event, Looked)][-1:]
    return any(found.participants == look.completed and found.planned == (look.kind == 'planned') for found in last)


def counted(events: Iterable[Stored], until: int | None) -> list[Stored]:
    """The events of a look."""
    return [stored for stored in events if until is None or stored.number <= until]


def _completed(events: Iterable[Stored], mode: Mode) -> int:
    """The number of participants who completed and are not excluded."""
    people = fold_all(events).values()
    return sum(one.mode == mode and one.outcome == 'completed' and not one.is_excluded for one in people)


def departures(
    events: Sequence[Stored],
    plan: PlanSettings,
    look: Look,
    mode: Mode,
) -> list[str]:
    """Sentences on where a study and its analysis depart from the plan that was frozen; none where they do not.

    Args:
        events: of the store, all of them.
        plan: of the analysis.
    """
    frozen = frozen_plan(events)
    if frozen is None:
        return ['No plan was frozen: nobody has consented.']
    own = [one for one in fold_all(events).values() if one.mode == mode]
    planned = to_dict(frozen_settings(frozen.plan))
    found = [f'This analysis has another plan than was frozen: {line}.' for line in differences(planned, to_dict(plan))]
    if others := sum(bool(one.agreed_at) and one.plan != frozen.plan_hash for one in own):
        found.append(f'{_participants(others)} consented while the server had another plan than was frozen.')
    found += _other_configs(events, frozen)
    if strange := sorted({one.main.pair for one in own if one.main} - {tuple(pair) for pair in frozen.plan['pairs']}):
        found.append(f'Pairs that were not planned: {", ".join(":".join(pair) for pair in strange)}.')
    if mode == 'live':
        found += _of_looks(events, plan, look)
    excluded = [one for one in own if one.is_excluded]
    if excluded:
        seen = min((stored.number for stored in events if isinstance(stored.event, Looked)), default=None)
        late = {
            stored.participant
            for stored in events
            if seen is not None and stored.number > seen and isinstance(stored.event, Excluded)
        } & {one.id for one in excluded}
        found.append(
            f'{_participants(len(excluded))} {_were(len(excluded))} excluded by an administrator, for reasons below'
            + (f'; {len(late)} of them after results by model could be seen.' if late else '.')
        )
    return found


def _other_configs(events: Sequence[Stored], frozen: PlanFrozen) -> list[str]:
    """Servers with another config than that of the first consent, and how many arrived while they ran."""
    config, starts, arrived = frozen.config_hash, 0, 0
    for stored in events:
        match stored.event:
            case Opened(config_hash=config):
                starts += config != frozen.config_hash
            case Arrived(mode) if mode != 'preview':
                arrived += config != frozen.config_hash
    if not starts:
        return []
    return [
        f'The server was started {_times(starts)} with another config than at the first consent; '
        f'{_participants(arrived)} arrived at such a server.'
    ]


def _of_looks(events: Sequence[Stored], plan: PlanSettings, look: Look) -> list[str]:
    found = []
    for event in (stored.event for stored in events):
        if isinstance(event, Looked) and not event.planned:
            found.append(
                f'Results by model could be seen once {_participants(event.participants)} had completed, which was not '
                f'planned: {event.reason or "no reason given"}.'
            )
    if look.completed != plan.participants and look.shares[-1] == 1:
        found.append(f'{_participants(look.completed)} completed; {plan.participants} were planned.')
    return found


def _participants(number: int) -> str:
    return '1 participant' if number == 1 else f'{number:,} participants'


def _were(number: int) -> str:
    return 'was' if number == 1 else 'were'


def _times(number: int) -> str:
    return 'once' if number == 1 else f'{number} times'
