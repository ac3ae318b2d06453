"""Departures of a study and its analysis from the plan that was frozen: sentences for its report."""

from collections.abc import Mapping, Sequence
from typing import Any

from simrl.run.config import differences, to_dict
from simrl.study.events import Arrived, Excluded, Looked, Mode, Opened, PlanFrozen, RecruitmentEnded, Stored
from simrl.study.looks import Look, counted, frozen_plan, recruitment_end
from simrl.study.participant import completed, fold_all
from simrl.study.plan import read_plan
from simrl.study.settings import PlanSettings
from simrl.study.texts import number_of


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
    planned = to_dict(read_plan(frozen.plan).settings)
    found = [f'This analysis has another plan than was frozen: {line}.' for line in differences(planned, to_dict(plan))]
    if others := sum(bool(one.agreed_at) and one.plan != frozen.plan_hash for one in own):
        found.append(f'{number_of(others, "participant")} consented while the server had another plan than was frozen.')
    found += _other_configs(events, frozen)
    planned_pairs = {frozenset(pair) for pair in frozen.plan['pairs']}
    assigned = {one.main.pair for one in own if one.main}
    if strange := sorted(pair for pair in assigned if frozenset(pair) not in planned_pairs):
        found.append(f'Pairs that were not planned: {", ".join(":".join(pair) for pair in strange)}.')
    if mode == 'live':
        found += _of_looks(events, plan, look) + _of_end(events, plan, mode)
    excluded = [one for one in own if one.is_excluded and one.agreed_at is not None]  # others are in no analysis
    if excluded:
        seen = min((stored.number for stored in events if isinstance(stored.event, Looked)), default=None)
        late = {
            stored.participant
            for stored in events
            if seen is not None and stored.number > seen and isinstance(stored.event, Excluded)
        } & {one.id for one in excluded}
        found.append(
            f'{number_of(len(excluded), "participant")} {_were(len(excluded))} excluded by an administrator, for '
            'reasons below' + (f'; {len(late)} of them after results by model could be seen.' if late else '.')
        )
    return found


def _other_configs(events: Sequence[Stored], frozen: PlanFrozen) -> list[str]:
    """Servers with another config than that of the first consent: how many arrived there, and what was another."""
    config, starts, arrived = frozen.config_hash, 0, 0
    fields: dict[str, Mapping[str, Any]] = {}  # by hash
    for stored in events:
        match stored.event:
            case Opened(config_hash=config, config=given):
                fields[config] = given
                starts += config != frozen.config_hash
            case Arrived(mode) if mode != 'preview':
                arrived += config != frozen.config_hash
    if not starts:
        return []
    first = fields.pop(frozen.config_hash, {})
    changed = [line for given in fields.values() for line in (differences(first, given) if first and given else ())]
    what = f' Other fields: {"; ".join(dict.fromkeys(map(_short, changed)))}.' if changed else ''
    return [
        f'The server was started {_times(starts)} with another config than at the first consent; '
        f'{number_of(arrived, "participant")} arrived at such a server.{what}'
    ]


def _short(line: str) -> str:
    """A difference without the hashes of contents, which say nothing to people."""
    field = line.partition(':')[0]
    return f'{field}: another content' if field in ('tasks', 'texts', 'panel') else line


def _of_looks(events: Sequence[Stored], plan: PlanSettings, look: Look) -> list[str]:
    found = []
    for event in (stored.event for stored in events):
        if isinstance(event, Looked) and not event.planned:
            found.append(
                f'Results by model could be seen once {number_of(event.participants, "participant")} had completed, '
                f'which was not planned: {event.reason or "no reason given"}.'
            )
    if look.completed != plan.participants and look.shares[-1] == 1:
        found.append(f'{number_of(look.completed, "participant")} completed; {plan.participants} were planned.')
    return found


def _of_end(events: Sequence[Stored], plan: PlanSettings, mode: Mode) -> list[str]:
    """An end of recruitment before the planned number had completed, or after results could be seen."""
    ended = recruitment_end(events)
    if ended is None:
        return []
    assert isinstance(ended.event, RecruitmentEnded)
    before = counted(events, ended.number)
    number = len(completed(fold_all(before).values(), mode))
    seen = any(isinstance(stored.event, Looked) for stored in before)
    if number >= plan.participants:
        return []
    return [
        f'Recruitment was ended once {number_of(number, "participant")} of {plan.participants} had completed'
        f'{", after results by model could be seen" if seen else ""}: {ended.event.reason}.'
    ]


def _were(number: int) -> str:
    return 'was' if number == 1 else 'were'


def _times(number: int) -> str:
    return 'once' if number == 1 else f'{number} times'
