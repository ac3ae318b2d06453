"""Flags of the participants of a study that runs, computed off its event loop and only where something happened."""

import asyncio
from collections.abc import Iterable

from simrl.study.events import PlanFrozen
from simrl.study.flags import Flag
from simrl.study.looks import Look, counted
from simrl.study.participant import Participant, fold_all
from simrl.study.plan import Plan, read_plan
from simrl.study.running import Running
from simrl.study.screens import Own, all_flags, names_of
from simrl.study.settings import plan_of


def plan_in_force(running: Running) -> Plan:
    """The plan that was frozen, or before that the config's."""
    frozen: PlanFrozen | None = running.history.plan
    return read_plan(frozen.plan if frozen else plan_of(running.settings))


class Screening:
    """The flags of a study's mode, those of now and those as of looks that were made."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._lock = asyncio.Lock()  # two pages at once compute nothing twice
        self._known: dict[str, Own] = {}
        self._of: list[tuple[str, int]] = []  # ids and versions that `_found` is of
        self._found: dict[str, tuple[Flag, ...]] = {}
        self._plan = plan_in_force(running)
        self._at: dict[int, dict[str, tuple[str, ...]]] = {}

    async def flags(self) -> dict[str, tuple[Flag, ...]]:
        """The flags by participant, of those who have some and whose task the study still has."""
        async with self._lock:
            plan = plan_in_force(self._running)
            if plan != self._plan:  # it was frozen meanwhile, by the participants' first consent
                self._known, self._of, self._plan = {}, [], plan
            states = self._screened(self._running.participants.values())
            of = [(one.id, one.version) for one in states]
            if of != self._of:
                tasks = self._running.tasks
                self._found = await asyncio.to_thread(all_flags, states, tasks, plan.screens, self._known)
                self._of = of
            return self._found

    async def names(self, look: Look | None = None) -> dict[str, tuple[str, ...]]:
        """Names of flags by participant; as of a look that was made those that its events come to."""
        if look is None or look.until is None:
            return names_of(await self.flags())
        async with self._lock:
            if look.number not in self._at:
                self._at[look.number] = await asyncio.to_thread(self._names_at, look)
            return self._at[look.number]

    def _names_at(self, look: Look) -> dict[str, tuple[str, ...]]:
        events = counted(self._running.store.events(), look.until)
        states = self._screened(fold_all(events).values())
        return names_of(all_flags(states, self._running.tasks, plan_in_force(self._running).screens))

    def _screened(self, participants: Iterable[Participant]) -> list[Participant]:
        known = {task.id for kind in self._running.tasks.types for task in kind.tasks}
        return [
            one
            for one in participants
            if one.mode == self._running.settings.mode and (one.prepared is None or one.prepared.task in known)
        ]
