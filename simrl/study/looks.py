"""Looks at the results of a study that runs: when one is open, which were made, and what they show.

What a look shows are the events up to it, so that to open its page once more tells no more; those of the last planned
look are all. What was planned is what was frozen at the first consent.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from simrl.run.config import differences
from simrl.study import export
from simrl.study.analysis import Analysis, analyse
from simrl.study.events import Looked, Stored
from simrl.study.flags import ScreenSettings
from simrl.study.overview import completed
from simrl.study.plan import LookBound, frozen_screens, frozen_settings, is_finished, next_look
from simrl.study.running import Running
from simrl.study.settings import PlanSettings, plan_of


@dataclasses.dataclass(frozen=True)
class Look:
    """A look that was made. `number`: among all looks, from 1; `is_last`: planned, and of the whole study."""

    number: int
    stored: Stored
    looked: Looked
    is_last: bool


def plan_in_force(running: Running) -> PlanSettings:
    """The plan that was frozen, or before that the config's."""
    return frozen_settings(running.plan.plan) if running.plan else running.settings.plan


def pairs_in_force(running: Running) -> int:
    """The number of pairs that the level is shared by."""
    return len(running.plan.plan['pairs']) if running.plan else len(running.settings.compared)


def screens_in_force(running: Running) -> ScreenSettings:
    """The thresholds of screens in that plan."""
    return frozen_screens(running.plan.plan) if running.plan else running.settings.screens


def departures(running: Running) -> list[str]:
    """The fields in which the config differs from the frozen plan."""
    return differences(running.plan.plan, plan_of(running.settings)) if running.plan else []


def open_look(running: Running) -> LookBound | None:
    """The planned look that is open, if any."""
    done = completed(running.participants.values(), running.settings)
    return next_look(plan_in_force(running), pairs_in_force(running), len(done), running.looks)


def looks_of(running: Running) -> list[Look]:
    """The looks that were made."""
    plan = plan_in_force(running)
    found: list[Look] = []
    for stored in running.history:
        if isinstance(looked := stored.event, Looked):
            found.append(Look(len(found) + 1, stored, looked, is_finished(plan, [looked])))
    return found


def results_of(running: Running, look: Look, flags: Mapping[str, Sequence[str]]) -> Analysis:
    """The analysis of the events up to a look, at its level."""
    taken = export.snapshot(events_of(running, look), running.settings.mode, flags)
    plan = plan_in_force(running)
    before = [one.looked for one in looks_of(running)[: look.number - 1] if one.looked.planned]
    shares = [min(1.0, one.participants / plan.participants) for one in before]
    now = min(1.0, look.looked.participants / plan.participants)
    if not look.looked.planned:  # no alpha is left for it: intervals are those of a single look, and say so
        shares, now = [], 1.0
    return analyse(taken.participants, taken.votes, plan, mode=taken.mode, shares=(*shares, now), resamples=2000)


def events_of(running: Running, look: Look) -> list[Stored]:
    """The events that a look shows."""
    events = running.store.events()
    return events if look.is_last else [stored for stored in events if stored.number <= look.stored.number]
