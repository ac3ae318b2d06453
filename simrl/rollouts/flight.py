"""Conversations in flight: which row has which conversation, where its caches are, and what they are fed.

1. `admit`: conversations that wait enter the rows of those that have ended.
2. `shrink`: at the end, when none waits, rows leave.
3. `fill_window`: rows that wait for a side enter its window, and are fed.

Letters as in `window.py`.
"""

import bisect
import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from simrl.rollouts import schedule
from simrl.rollouts.agents import Policy
from simrl.rollouts.histories import Histories, unfed
from simrl.rollouts.window import Caches, Given, enter, grow, new_caches, regroup

Entering = tuple[int, int | None]  # a row, and its place among the parked ones; None: it is in the window


@dataclasses.dataclass(eq=False)
class Flight:
    """R conversations in flight, in equal parts for D devices.

    Attributes:
        meshes: of both sides.
        shards: D; where the meshes have different numbers of devices along `data`, the least multiple of both: then
            devices of one have several parts.
        sizes: all levels.
        level: the present one; R is D times its rows.
        conversation: int `[R]`, the number of each row's conversation, which may have ended.
        waiting: numbers of conversations that are to enter.
        place: int `[2, R]`, the place of each row's cache among those of its device, for each side.
        caches: of each side, None before their first use.
        side: which decoded last.
    """

    meshes: tuple[Mesh, Mesh]
    shards: int
    sizes: list[schedule.Level]
    level: schedule.Level
    conversation: np.ndarray
    waiting: collections.deque[int]
    place: np.ndarray
    caches: list[Caches | None]
    side: int = 0

    @property
    def apart(self) -> bool:
        """True if the sides have no device in common."""
        return set(self.meshes[0].devices.flat).isdisjoint(self.meshes[1].devices.flat)

    def of_devices(self, rows: np.ndarray) -> np.ndarray:
        """`[..., R]` as `[..., D, R / D]`."""
        return rows.reshape(*rows.shape[:-1], self.shards, -1)

    @property
    def window(self) -> np.ndarray:
        """int `[D W]`: the row in each place of the side's window, one device after the other."""
        order = np.argsort(self.of_devices(self.place[self.side]), axis=1)[:, : self.level.window]
        return (order + np.arange(self.shards)[:, None] * self.level.rows).reshape(-1)


def start_flight(h: Histories, rows: int, meshes: tuple[Mesh, Mesh]) -> Flight:
    """The first conversations, of which `rows` are in flight; the others wait."""
    shards, sides = parts_of(rows, meshes), sum(view is not None for view in h.views)
    sizes = schedule.levels(rows, shards, sides)
    place = np.tile(np.arange(sizes[0].rows), (2, shards))
    waiting = collections.deque((np.flatnonzero(h.running[rows:]) + rows).tolist())
    return Flight(meshes, shards, sizes, sizes[0], np.arange(rows), waiting, place, [None, None])


def parts_of(rows: int, meshes: tuple[Mesh, Mesh]) -> int:
    """The number of equal parts of the rows that no device of either mesh has a piece of."""
    sizes = [mesh.shape['data'] for mesh in meshes]
    return math.lcm(*(size for size in sizes if rows % size == 0))


def admit(flight: Flight, h: Histories) -> None:
    """Conversations that wait enter the rows of those that have ended."""
    for row in np.flatnonzero(~h.running[flight.conversation])[: len(flight.waiting)]:
        flight.conversation[row] = flight.waiting.popleft()


def shrink(flight: Flight, h: Histories, running: np.ndarray) -> None:
    """Rows leave where those that run fit a smaller level."""
    per_device = flight.of_devices(running)
    level = schedule.level_for(per_device.sum(axis=1), flight.sizes)
    if level == flight.level:
        return
    kept = np.stack([schedule.rows_left(of_one, level.rows) for of_one in per_device])
    rows = (kept + np.arange(flight.shards)[:, None] * flight.level.rows).reshape(-1)
    places = flight.place[:, rows].reshape(2, flight.shards, level.rows)
    order = np.argsort(places, axis=2)  # rows keep the order of their places
    for side, caches in enumerate(flight.caches):
        if caches is not None:
            old = np.take_along_axis(places[side], order[side], axis=1)
            with jax.set_mesh(flight.meshes[side]):
                flight.caches[side] = regroup(h.view(side).spec, caches, old.astype(np.int32), level)
    flight.place = np.argsort(order, axis=2).reshape(2, -1)
    flight.conversation, flight.level = flight.conversation[rows], level


def fill_window(flight: Flight, h: Histories, policy: Policy, wanted: np.ndarray, steps: int) -> None:
    """Fills the side's window with rows that wait for it, and feeds all of them what they have not fed yet.

    The side's mesh is set.
    """
    view, level, place = h.view(flight.side), flight.level, flight.of_devices(flight.place[flight.side])
    said = flight.of_devices(h.num_messages[flight.conversation])
    calls: list[list[Entering]] = []  # of each device
    behind = flight.of_devices(unfed(view, flight.conversation))
    for device, own in enumerate(flight.of_devices(wanted)):
        entering: list[Entering] = []
        for row, other in schedule.exchanges(place[device], own, said[device], level.window):
            into, out_of = int(place[device, other]), int(place[device, row])
            entering.append((row, out_of - level.window))
            place[device, row], place[device, other] = into, out_of
        fresh = {row for row, _ in entering}
        inside = np.flatnonzero(own & (place[device] < level.window) & (behind[device] > 0))
        entering += [(row, None) for row in inside.tolist() if row not in fresh]
        order = np.argsort([-behind[device, row] for row, _ in entering], kind='stable')
        calls.append([entering[i] for i in order.tolist()])
    flight.place[flight.side] = place.reshape(-1)
    decoding = flight.conversation[wanted & (flight.place[flight.side] < level.window)]
    needed = min(int(view.length[decoding].max()) + steps, view.capacity)
    caches = flight.caches[flight.side]
    if caches is None:
        caches = new_caches(view.spec, level, flight.shards, view.rooms[0])
    caches = grow(view.spec, caches, view.rooms[: bisect.bisect_left(view.rooms, needed) + 1])
    for start in range(0, max(map(len, calls)), level.entering):
        call = [of_one[start : start + level.entering] for of_one in calls]
        rows = [device * level.rows + row for device, of_one in enumerate(call) for row, _ in of_one]
        caches = enter(policy, caches, _given(flight, h, call))
        while unfed(view, flight.conversation[rows]).any():
            call = [[(row, None) for row, _ in of_one] for of_one in call]
            caches = enter(policy, caches, _given(flight, h, call))
    flight.caches[flight.side] = caches


def _given(flight: Flight, h: Histories, call: Sequence[Sequence[Entering]]) -> Given:
    """Arguments of `enter`: the call's rows with their next tokens, which count as fed."""
    view, level, shards = h.view(flight.side), flight.level, flight.shards
    place = flight.of_devices(flight.place[flight.side])
    places, parked = (np.zeros((shards, level.entering), np.int32) for _ in range(2))
    outside = np.zeros((shards, level.entering), bool)
    start, count = (np.zeros(shards * level.entering, np.int32) for _ in range(2))
    tokens = np.zeros((shards * level.entering, view.most_fed), np.int32)
    for device, entering in enumerate(call):
        for number, (row, out_of) in enumerate(entering):
            places[device, number] = place[device, row]
            if out_of is not None:
                outside[device, number], parked[device, number] = True, out_of
            conversation = flight.conversation[device * level.rows + row]
            at, first = device * level.entering + number, int(view.fed[conversation])
            last = min(int(view.length[conversation]) - 1, first + view.most_fed)
            start[at], count[at] = first, last - first
            tokens[at, : last - first] = view.tokens[conversation, first:last]
            view.fed[conversation] = last
    rows = np.array([len(entering) for entering in call], np.int32)
    return Given(places, outside, parked, rows, tokens, start, count)
