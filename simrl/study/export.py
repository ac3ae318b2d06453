"""The events of a store -> tables to work on: votes, participants, preferences, payments.

1. `snapshot`: participants of one mode and their votes, with the event that each vote is in the store.
2. `turn_rows`, `participant_rows`: flat tables that join by `participant`, and with the store by `event`.
3. `preferences`: what a reward model trains on (`records.Preference`).
4. `payment_rows`: for the panel, by its own ids; nothing in it joins with the other tables.

Tables are blind unless asked for otherwise: votes are by side, and which model was on which side is left out, with what
would tell it: seconds, and the replies of a turn in which one may name its model.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from simrl.conversations.records import Message, Preference
from simrl.conversations.row_files import RowError
from simrl.conversations.splits import SplitSettings, hash64, split_of
from simrl.study.events import STUDY, Mode, Opened, PairAssigned, PlanFrozen, Preferred, Replied, Stored
from simrl.study.participant import Participant, fold_all
from simrl.study.plan import read_plan
from simrl.study.settings import CODES, StudySettings
from simrl.study.store import Identity
from simrl.study.tables import Row, Table, to_unicode
from simrl.study.votes import Vote, votes

TIE, EXCLUDED, UNFINISHED, NAMED = 'ties', 'excluded participants', 'not completed', 'a reply may name its model'

_TURNS = {
    'id': 'string',  # participant/turn
    'participant': 'string',
    'turn': 'int64',
    'event': 'int64',  # number of the vote in the store
    'mode': 'string',
    'pair': 'string',  # FIRST:SECOND, in the order of the config; says nothing of sides
    'document_type': 'string',
    'task': 'string',
    'message': 'string',
    'left_text': 'string',
    'right_text': 'string',
    'left_cut': 'bool',
    'right_cut': 'bool',
    'named': 'bool',  # a reply may name its model; both texts are null in a blind table
    'choice': 'string',
    'kept': 'string',
    'reason': 'string',
    'message_pasted': 'int64',
    'message_typed': 'int64',
    'message_seconds': 'float64',
    'reason_pasted': 'int64',
    'reason_typed': 'int64',
    'reason_seconds': 'float64',
    'asked_at': 'float64',
    'shown_at': 'float64',
    'judged_at': 'float64',
    'outcome': 'string',
    'flags': 'list',
    'excluded': 'string',  # an administrator's reason
    'plan_hash': 'string',
    'config_hash': 'string',  # of the server that asked for the replies
}
_UNBLINDED = {
    'left': 'string',
    'right': 'string',
    'first_was_left': 'bool',
    'preference': 'float64',  # 1: for the pair's first model
    'left_seconds': 'float64',
    'right_seconds': 'float64',
    'left_named': 'bool',
    'right_named': 'bool',
}
_PARTICIPANTS = {
    'participant': 'string',
    'mode': 'string',
    'pair': 'string',
    'document_type': 'string',
    'task': 'string',
    'notes': 'list',
    'outcome': 'string',
    'step': 'string',
    'votes': 'int64',
    'void_turns': 'int64',
    'check_tries': 'int64',
    'attentive': 'bool',
    'text': 'string',
    'text_pasted': 'int64',
    'text_typed': 'int64',
    'text_seconds': 'float64',
    'other_sessions': 'int64',
    'withdrew_reason': 'string',
    'began_at': 'float64',
    'seen_at': 'float64',
    'flags': 'list',
    'excluded': 'string',
    'plan_hash': 'string',
}
_PAYMENTS = {
    'panel_id': 'string',
    'study_id': 'string',
    'session_id': 'string',
    'outcome': 'string',
    'code': 'string',
    'minutes': 'float64',
    'attentive': 'bool',
}
_PREFERENCES = {
    'id': 'string',
    'source': 'string',
    'split': 'string',
    'prompt': 'messages',
    'chosen': 'string',
    'rejected': 'string',
}


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All that a store has of one mode.

    Attributes:
        participants: of the mode, in the order in which they came.
        flags: their names, by participant.
        votes: of main sessions.
        events: by a vote's id, its number in the store.
        configs: by a vote's id, the hash of the config of the server that asked for its replies.
        plan: what was frozen at the first consent.
    """

    mode: Mode
    participants: tuple[Participant, ...]
    flags: Mapping[str, Sequence[str]]
    votes: list[Vote]
    events: Mapping[str, int]
    configs: Mapping[str, str]
    plan: PlanFrozen | None


def snapshot(events: Sequence[Stored], mode: Mode, flags: Mapping[str, Sequence[str]]) -> Snapshot:
    """Reads the events of a store, in their order; previews and the other mode are left out.

    Args:
        flags: names by participant; none of one who is not there.
    """
    plan = None
    opened = ''  # hash of the config of the server that runs
    number_of: dict[str, int] = {}
    config_of: dict[str, str] = {}
    turns: dict[str, int] = {}  # votes so far of a participant's main session
    for stored in events:
        name = stored.participant
        match stored.event:
            case Opened(config_hash=opened):
                pass
            case PlanFrozen() as frozen:
                plan = plan or frozen
            case PairAssigned(session='main'):
                turns[name] = 0
            case Replied() if name in turns:  # the vote may come to a server that was started since
                config_of[f'{name}/{turns[name] + 1}'] = opened
            case Preferred() if name in turns:
                turns[name] += 1
                number_of[f'{name}/{turns[name]}'] = stored.number
    folded = fold_all(stored for stored in events if stored.participant != STUDY)
    participants = tuple(state for state in folded.values() if state.mode == mode)
    found = votes(participants, mode, flags, read_plan(plan.plan).pairs if plan else ())
    return Snapshot(mode, participants, flags, found, number_of, config_of, plan)


def turn_rows(taken: Snapshot, *, blind: bool = True) -> Table:
    """A row for each vote, of whomever: `outcome`, `excluded` and `flags` say whom an analysis leaves out."""
    plans = {participant.id: participant.plan for participant in taken.participants}
    rows = []
    for vote in taken.votes:
        row = {
            **_of(vote, _TURNS),
            'event': taken.events[vote.id],
            'mode': taken.mode,
            'pair': ':'.join(vote.pair),
            'named': bool(vote.named),
            'flags': list(vote.flags),
            'plan_hash': plans[vote.participant],
            'config_hash': taken.configs[vote.id],
        }
        for field in ('message', 'reason'):
            conduct = dataclasses.asdict(getattr(vote, f'{field}_conduct'))
            row |= {f'{field}_{key}': value for key, value in conduct.items()}
        if not blind:
            row |= _of(vote, _UNBLINDED) | {f'{side}_named': side in vote.named for side in ('left', 'right')}
        elif vote.named:  # which of the two it is tells the model, too
            row |= {'left_text': None, 'right_text': None}
        rows.append(row)
    return Table(_TURNS if blind else {**_TURNS, **_UNBLINDED}, rows)


def _of(vote: Vote, columns: Iterable[str]) -> Row:
    """The columns that are attributes of a vote."""
    return {name: getattr(vote, name) for name in columns if hasattr(vote, name)}


def participant_rows(taken: Snapshot) -> Table:
    """A row for each participant, with the final text. It is blind: who was preferred is in the turns."""
    order = {frozenset(vote.pair): vote.pair for vote in taken.votes}  # as in the table of turns
    rows = []
    for state in taken.participants:
        prepared, wrote, main = state.prepared, state.wrote, state.main
        row: Row = dict.fromkeys(_PARTICIPANTS)
        row |= {
            'participant': state.id,
            'mode': state.mode,
            'pair': ':'.join(order.get(frozenset(main.pair), main.pair)) if main else None,
            'document_type': state.document_type,
            'outcome': state.outcome,
            'step': state.step,
            'votes': len(main.judged) if main else 0,
            'void_turns': sum(turn.voids for turn in main.turns) if main else 0,
            'check_tries': len(state.checks),
            'other_sessions': state.other_sessions,
            'withdrew_reason': state.withdrew.reason if state.withdrew else None,
            'began_at': state.began_at,
            'seen_at': state.seen_at,
            'flags': list(taken.flags.get(state.id, ())),
            'excluded': state.excluded.reason if state.excluded and state.is_excluded else None,
            'plan_hash': state.plan,
        }
        if prepared:
            row |= {'task': prepared.task, 'notes': list(prepared.notes)}
        if wrote:
            row |= {'text': wrote.text, 'attentive': wrote.attentive}
            row |= {f'text_{key}': value for key, value in dataclasses.asdict(wrote.conduct).items()}
        rows.append(row)
    return Table(_PARTICIPANTS, rows)


def preferences(
    taken: Snapshot, source: str, *, blind: bool = True
) -> tuple[list[Preference], collections.Counter[str]]:
    """Votes that are no ties as preferences; also counts what is left out, by reason.

    Of participants who completed and are not excluded. The prompt is the conversation as both models saw it. Splits are
    of participants, by a hash of their ids.

    Args:
        source: name of the data set.
        blind: leaves out votes on a reply that may name its model, and those after one that did.
    """
    by_id = {participant.id: participant for participant in taken.participants}
    left_out: collections.Counter[str] = collections.Counter()
    found = []
    for vote in taken.votes:
        reason = (
            (EXCLUDED if vote.excluded is not None else '')
            or (UNFINISHED if vote.outcome != 'completed' else '')
            or (TIE if vote.choice == 'tie' else '')
            or (NAMED if blind and (vote.named or _names_before(by_id[vote.participant], vote.turn)) else '')
        )
        if not reason:
            texts = {'left': _clean(vote.left_text), 'right': _clean(vote.right_text)}
            try:
                preference = Preference(
                    id=vote.id,
                    source=source,
                    split=split_of(hash64(vote.participant), SplitSettings()),
                    prompt=_prompt(by_id[vote.participant], vote.turn),
                    chosen=texts[vote.choice],
                    rejected=texts['right' if vote.choice == 'left' else 'left'],
                )
            except RowError as error:
                reason = error.reason
            else:
                found.append(preference)
        if reason:
            left_out[reason] += 1
    return found, left_out


def preference_rows(found: Iterable[Preference]) -> Table:
    """The rows that `records.read_preferences` reads."""
    return Table(_PREFERENCES, [dataclasses.asdict(preference) for preference in found])


def _names_before(participant: Participant, turn: int) -> bool:
    """True if a reply that the conversation continued from, before a turn (from 1), may name its model."""
    assert participant.main is not None
    earlier = participant.main.turns[: turn - 1]
    return any(one.preferred.kept in one.replies.named for one in earlier if one.preferred and one.replies)


def _prompt(participant: Participant, turn: int) -> tuple[Message, ...]:
    """The conversation up to the message of a turn (from 1)."""
    assert participant.main is not None
    messages: list[Message] = []
    for earlier in participant.main.turns[: turn - 1]:
        messages += [Message('user', _clean(earlier.message)), Message('assistant', _clean(earlier.kept))]
    return (*messages, Message('user', _clean(participant.main.turns[turn - 1].message)))


def payment_rows(
    participants: Iterable[Participant], identities: Mapping[str, Identity], settings: StudySettings
) -> Table:
    """A row for each participant whom the panel sent, by the panel's ids, sorted by them.

    Who had their data deleted is known to the panel alone.
    """
    rows = []
    for state in participants:
        if state.mode != settings.mode or state.id not in identities:
            continue
        rows.append(
            {
                **dataclasses.asdict(identities[state.id]),
                'outcome': state.outcome or 'under way',
                'code': getattr(settings.panel, state.outcome) if state.outcome in CODES else '',
                'minutes': round((state.seen_at - state.began_at) / 60, 1),
                'attentive': state.wrote.attentive if state.wrote else None,
            }
        )
    return Table(_PAYMENTS, sorted(rows, key=lambda row: (row['panel_id'], row['session_id'])))


def _clean(text: str) -> str:
    """A text without outer white space, as readers of preferences strip it."""
    return to_unicode(text).strip()
