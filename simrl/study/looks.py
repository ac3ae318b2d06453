"""Looks at results by model: which one is open, which were made, and what each is of. Pure functions of events.

Results by model are seen at planned looks, or a reason is stored and every report says so. What a look shows are the
events up to it, so that to open it once more tells no more; those of the last planned look are all. What was planned is
what was frozen at the first consent.

1. `looks_of`: the looks that were made. 2. `open_look`: the planned look that is open. 3. `unplanned_look`: any other.
4. `look_at`: the look that a report is.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from simrl.study.events import Looked, Mode, PlanFrozen, RecruitmentEnded, Stored
from simrl.study.participant import Participant, completed, fold_all
from simrl.study.plan import Plan, next_look
from simrl.study.settings import PlanSettings

END = 1.0  # share of the last look


class NoLookError(ValueError):
    """No look is planned by now, and no reason is given for one that is not planned."""


@dataclasses.dataclass(frozen=True)
class Look:
    """A look at results by model.

    Attributes:
        kind: `rehearsal`: of a study that has no looks.
        completed: participants who had completed then and are not excluded.
        shares: of the planned participants at planned looks, this one last; one that is not planned counts as the end.
        alpha: two-sided, of one pair, that it spends; none is left for one that is not planned.
        reason: of one that is not planned.
        number: among all looks that were made, from 1; 0: it was not made yet.
        at: time, in seconds since 1970; None: it was not made yet.
        until: number of the last event that it shows; None: it shows all, also those after the end of the study.
    """

    kind: Literal['planned', 'unplanned', 'rehearsal']
    completed: int
    shares: tuple[float, ...]
    alpha: float = 0.0
    reason: str = ''
    number: int = 0
    at: float | None = None
    until: int | None = None

    @property
    def is_last(self) -> bool:
        """True for the last planned one: after it results are no secret any more."""
        return self.kind == 'planned' and self.shares[-1] == END


def frozen_plan(events: Iterable[Stored]) -> PlanFrozen | None:
    """The plan at the first consent; None before it."""
    return next((stored.event for stored in events if isinstance(stored.event, PlanFrozen)), None)


def recruitment_end(events: Iterable[Stored]) -> Stored | None:
    """The event by which recruitment ended; None while the study takes participants."""
    return next((stored for stored in events if isinstance(stored.event, RecruitmentEnded)), None)


def looks_of(events: Iterable[Stored], plan: PlanSettings) -> list[Look]:
    """The looks that were made; only the study's own events are read."""
    found: list[Look] = []
    is_over = False
    for stored in events:
        match stored.event:
            case RecruitmentEnded():
                is_over = True
            case Looked(participants=number, planned=planned, alpha=alpha, reason=reason):
                share = END if is_over or not planned else min(END, number / plan.participants)
                made = Look(
                    kind='planned' if planned else 'unplanned',
                    completed=number,
                    shares=_up_to(found, share),
                    alpha=alpha,
                    reason=reason,
                    number=len(found) + 1,
                    at=stored.at,
                    until=stored.number,
                )
                found.append(dataclasses.replace(made, until=None) if made.is_last else made)
    return found


def open_look(events: Sequence[Stored], plan: Plan, completed: int) -> Look | None:
    """The planned look that is open, if any.

    Args:
        events: of the study itself, or all.
        completed: participants who completed and are not excluded.
    """
    made, is_over = _shares(looks_of(events, plan.settings)), recruitment_end(events) is not None
    bound = next_look(plan.settings, max(1, len(plan.pairs)), completed, made, is_over=is_over)
    return None if bound is None else Look('planned', completed, (*made, bound.share), bound.alpha)


def unplanned_look(events: Iterable[Stored], plan: Plan, completed: int, reason: str) -> Look:
    """A look that departs from the plan; the arguments are those of `open_look`.

    Planned looks that were made have spent alpha: its interval has the level that the end of the study would have now.
    """
    return Look('unplanned', completed, _up_to(looks_of(events, plan.settings), END), reason=reason.strip())


def look_at(events: Sequence[Stored], plan: Plan, mode: Mode, reason: str = '') -> Look:
    """The look that a report is.

    Args:
        events: of the store.
        reason: for a look that is not planned.

    Raises:
        NoLookError: none is open or was made, and there is no reason for another.
    """
    number = len(completed(fold_all(events).values(), mode))
    if mode != 'live':
        return Look('rehearsal', number, (END,))
    if (opened := open_look(events, plan, number)) is not None:
        return opened
    made = [look for look in looks_of(events, plan.settings) if look.kind == 'planned']
    if reason.strip() and not (made and made[-1].is_last):
        return unplanned_look(events, plan, number, reason)
    if made:  # people may have been excluded since, or had their data deleted
        then = fold_all(counted(events, made[-1].until)).values()
        return dataclasses.replace(made[-1], completed=len(completed(then, mode)))
    raise NoLookError(
        f'expected {min((*plan.settings.looks, END)):.0%} of the {plan.settings.participants} planned participants '
        f'before results by model are seen, found {number} who completed; an end of recruitment makes the last look '
        'planned, and a reason makes it a look that departs from the plan'
    )


def to_event(look: Look, participants: Iterable[Participant], mode: Mode) -> Looked:
    """The event of a look, which is stored before it shows anything."""
    number_of_votes = sum(len(one.main.judged) for one in completed(participants, mode) if one.main)
    return Looked(look.completed, number_of_votes, look.kind == 'planned', look.alpha, look.reason)


def is_stored(look: Look, events: Iterable[Stored]) -> bool:
    """True if the last look that the store has is this one."""
    last = [stored.event for stored in events if isinstance(stored.event, Looked)][-1:]
    return any(found.participants == look.completed and found.planned == (look.kind == 'planned') for found in last)


def counted(events: Iterable[Stored], until: int | None) -> list[Stored]:
    """The events of a look."""
    return [stored for stored in events if until is None or stored.number <= until]


def _shares(made: Iterable[Look]) -> tuple[float, ...]:
    """The shares of planned looks."""
    return tuple(look.shares[-1] for look in made if look.kind == 'planned')


def _up_to(made: Iterable[Look], share: float) -> tuple[float, ...]:
    """The shares at planned looks with one more; after the last planned look there is no further one."""
    before = _shares(made)
    return before if before[-1:] == (END,) else (*before, share)
