"""Exports: every vote once, joined with the store, nothing of the models in a blind one; files that read back."""

import collections
import csv
import dataclasses
import io
import json

import pyarrow.parquet
import pytest

from simrl.conversations.records import read_preferences, write_preferences
from simrl.study.events import Deleted, Excluded, Opened, PairAssigned, PlanFrozen, Preferred, Replied, Stored, Wrote
from simrl.study.export import (
    EXCLUDED,
    NAMED,
    TIE,
    UNFINISHED,
    Snapshot,
    participant_rows,
    payment_rows,
    preferences,
    snapshot,
    turn_rows,
)
from simrl.study.settings import PanelSettings, StudyModel, StudySettings
from simrl.study.store import Identity
from simrl.study.tables import to_csv, to_jsonl, to_parquet
from tests.study.planted import Planted, planted_study

PAIR = ('quartz', 'basalt')
PLANTED = Planted(people=24, win_rates={PAIR: 0.7}, leaves=0.05, fails=0.1, voids=0.2, named=0.2, position=0.1)
SETTINGS = StudySettings(
    models={name: StudyModel(source=name) for name in PAIR},
    pairs=('quartz:basalt',),
    panel=PanelSettings(return_url='https://x/{code}'),
)


def numbered(*parts: list[Stored]) -> list[Stored]:
    """The events of a store, one part after the other."""
    events = [stored for part in parts for stored in part]
    return [dataclasses.replace(stored, number=number) for number, stored in enumerate(events, 1)]


def of_study(version: int, event: Opened | PlanFrozen) -> list[Stored]:
    return [Stored(0, '', version, 0.0, event)]


@pytest.fixture(scope='module')
def events() -> list[Stored]:
    """Two servers, one after the other, with live participants each; previews; one who was excluded, one deleted."""
    first, _ = planted_study(PLANTED, 1)
    second, _ = planted_study(dataclasses.replace(PLANTED, people=6), 2)
    previews, _ = planted_study(dataclasses.replace(PLANTED, mode='preview', people=3), 3)
    gone, out = [stored.participant for stored in second if isinstance(stored.event, Wrote)][:2]
    last = {stored.participant: stored.version for stored in second}
    second = [stored for stored in second if stored.participant != gone or stored.version == 1]
    second += [
        Stored(0, gone, last[gone] + 1, 3e9, Deleted()),
        Stored(0, out, last[out] + 1, 3e9, Excluded(True, 'did not speak the language')),
    ]
    return numbered(
        of_study(1, Opened('1', 'config-1', PAIR)),
        of_study(2, PlanFrozen({}, 'plan', 'config-1')),
        first,
        previews,
        of_study(3, Opened('1', 'config-2', PAIR)),
        second,
    )


@pytest.fixture(scope='module')
def taken(events: list[Stored]) -> Snapshot:
    out = next(stored.participant for stored in events if isinstance(stored.event, Excluded))
    return snapshot(events, 'live', {out: ['fast', 'pasted']})


def test_every_vote_is_a_row_that_joins_with_the_store(events, taken):
    """By a plain walk over the events: its vote, its replies, its server's config; the training exchange is none."""
    live = {stored.participant for stored in events if getattr(stored.event, 'mode', '') == 'live'}
    by_number = {stored.number: stored for stored in events}
    rows = {row['event']: row for row in turn_rows(taken, blind=False).rows}
    session, replied, expected = {}, {}, set()
    for stored in events:
        match stored.event:
            case PairAssigned(name):
                session[stored.participant] = name
            case Replied():
                replied[stored.participant] = stored
            case Preferred() as vote if session.get(stored.participant) == 'main' and stored.participant in live:
                expected.add(stored.number)
                row, replies = rows[stored.number], replied[stored.participant].event
                assert (row['participant'], row['choice'], row['reason']) == (
                    stored.participant,
                    vote.choice,
                    vote.reason,
                )
                assert (row['left'], row['left_text'], row['right_text']) == (
                    replies.left,
                    replies.left_text,
                    replies.right_text,
                )
                second_server = next(
                    number for number, s in by_number.items() if getattr(s.event, 'config_hash', '') == 'config-2'
                )
                assert row['config_hash'] == ('config-2' if stored.number > second_server else 'config-1')
                preferred = {'left': row['left'], 'right': row['right'], 'tie': None}[vote.choice]
                assert row['preference'] == {PAIR[0]: 1, PAIR[1]: 0, None: 0.5}[preferred]
    assert set(rows) == expected
    assert {row['config_hash'] for row in rows.values()} == {'config-1', 'config-2'}
    assert len({row['id'] for row in rows.values()}) == len(rows)
    assert {row['mode'] for row in rows.values()} == {'live'}


def test_a_blind_table_has_nothing_that_depends_on_which_model_is_which(events):
    """With the two models exchanged in every event, no byte is another one: order of the pair's name aside."""

    def exchanged(stored: Stored) -> Stored:
        event = stored.event
        if isinstance(event, Replied):
            texts = {
                f'{side}_text': getattr(event, f'{side}_text').replace(getattr(event, side), '~')
                for side in ('left', 'right')
            }
            event = dataclasses.replace(event, left=event.right, right=event.left, **texts)
        return dataclasses.replace(stored, event=event)

    def files(events: list[Stored]) -> tuple[bytes, bytes, list]:
        taken = snapshot(events, 'live', {})
        table = turn_rows(taken)
        people = b''.join(to_jsonl(participant_rows(taken).rows))
        return b''.join(to_jsonl(table.rows)), people, preferences(taken, 'study')[0]

    own, other = files(events), files([exchanged(stored) for stored in events])
    assert own == other
    for line in own[0].splitlines():
        row = json.loads(line)
        assert row.pop('pair') == 'quartz:basalt'
        assert not any(name in json.dumps(row) for name in PAIR)  # replies that name a model are withheld
        assert (row['left_text'] is None) == (row['right_text'] is None) == row['named']
        assert not {'left', 'right', 'preference', 'first_was_left', 'left_seconds'} & set(row)
    assert sum(json.loads(line)['named'] for line in own[0].splitlines()) > 5
    assert len(own[2]) > 40
    assert not any(name in str(own[2]) for name in PAIR)


def test_participants_of_all_outcomes_are_there_and_previews_are_not(events, taken):
    rows = {row['participant']: row for row in participant_rows(taken).rows}
    assert len(rows) == 30
    outcomes = collections.Counter(row['outcome'] for row in rows.values())
    assert {'completed', 'failed_check', 'deleted'} <= set(outcomes)
    turns = collections.Counter(row['participant'] for row in turn_rows(taken).rows)
    assert {id: row['votes'] for id, row in rows.items() if row['votes']} == turns
    assert sum(row['void_turns'] for row in rows.values()) > 5
    gone = next(row for row in rows.values() if row['outcome'] == 'deleted')
    assert gone['text'] is gone['pair'] is gone['task'] is None
    out = next(row for row in rows.values() if row['excluded'])
    assert (out['excluded'], out['flags']) == ('did not speak the language', ['fast', 'pasted'])


def test_preferences_are_what_the_reward_model_reads(tmp_path, taken):
    found, left_out = preferences(taken, 'study')
    write_preferences(tmp_path / 'preferences.jsonl', found)
    read, counts = read_preferences(tmp_path / 'preferences.jsonl')
    assert read == found
    assert not +counts
    assert len(found) + left_out.total() == len(taken.votes)
    assert {TIE, EXCLUDED, UNFINISHED, NAMED} == set(left_out)
    votes = {vote.id: vote for vote in taken.votes}
    for preference in found:
        vote = votes[preference.id]
        sides = [vote.left_text, vote.right_text]
        assert [preference.chosen, preference.rejected] == (sides if vote.choice == 'left' else sides[::-1])
        assert preference.prompt[-1].content == vote.message
        assert len(preference.prompt) == 2 * vote.turn - 1
        before = votes.get(f'{vote.participant}/{vote.turn - 1}')
        if before:
            kept = before.left_text if before.kept == 'left' else before.right_text
            assert [message.content for message in preference.prompt[-3:-1]] == [before.message, kept]
    splits = collections.defaultdict(set)
    for preference in found:
        splits[preference.id.split('/')[0]].add(preference.split)
    assert all(len(own) == 1 for own in splits.values())  # a participant's votes are in one split
    assert NAMED not in preferences(taken, 'study', blind=False)[1]


def test_replies_that_no_record_takes_are_counted(events):
    def emptied(stored: Stored) -> Stored:
        if not isinstance(stored.event, Replied):
            return stored
        return dataclasses.replace(
            stored, event=dataclasses.replace(stored.event, left_text=' same\ud800 ', right_text='same\ud800')
        )

    taken = snapshot([emptied(stored) for stored in events], 'live', {})
    found, left_out = preferences(taken, 'study')
    assert not found
    assert left_out['equal replies'] > 40
    assert json.loads(next(to_jsonl(turn_rows(taken, blind=False).rows)))['right_text'] == 'same?'
    assert to_parquet(turn_rows(taken))


@pytest.mark.parametrize('blind', [True, False])
def test_files_have_all_rows_and_columns(taken, blind):
    table = turn_rows(taken, blind=blind)
    assert all(set(row) == set(table.columns) for row in table.rows)
    lines = [json.loads(line) for line in to_jsonl(table.rows)]
    read = pyarrow.parquet.read_table(io.BytesIO(to_parquet(table)))
    assert lines == table.rows == read.to_pylist()
    empty = pyarrow.parquet.read_table(io.BytesIO(to_parquet(dataclasses.replace(table, rows=[]))))
    assert empty.schema == read.schema


def test_payments_are_by_the_panels_ids_alone(taken):
    completed = [state for state in taken.participants if state.outcome == 'completed']
    identities = {state.id: Identity(f'p{n}', 's', f'x{n}') for n, state in enumerate(taken.participants)}
    identities[completed[0].id] = Identity('=HYPERLINK("//x")', '@s', '+x')
    table = payment_rows(taken.participants, identities, SETTINGS)
    assert len(table.rows) == len(taken.participants)
    codes = {row['outcome']: row['code'] for row in table.rows}
    assert codes['completed'] == 'COMPLETED'
    assert codes['failed_check'] == 'CHECKED'
    assert [row['panel_id'] for row in table.rows] == sorted(row['panel_id'] for row in table.rows)
    text = to_csv(table)
    assert not any(state.id in text for state in taken.participants)  # or votes could be joined with people
    [formula] = [row for row in csv.DictReader(io.StringIO(text)) if 'HYPERLINK' in row['panel_id']]
    assert formula['panel_id'].startswith("'=")
    assert formula['study_id'] == "'@s"
    assert not payment_rows(taken.participants, {}, SETTINGS).rows


def test_the_panel_knows_who_deleted_their_data(taken):
    """A store gives no identity of them; were one left, no code would be made up."""
    gone = [state for state in taken.participants if state.outcome == 'deleted']
    assert gone
    table = payment_rows(gone, {gone[0].id: Identity('p', 's', 'x')}, SETTINGS)
    assert table.rows[0]['code'] == ''


def test_a_vote_has_the_config_of_the_server_that_asked_for_its_replies(events):
    """The server is started with another config between the replies and the vote."""
    place = next(n for n, stored in enumerate(events) if isinstance(stored.event, Preferred) and n > 60)
    name = events[place].participant
    assert isinstance(events[place - 1].event, Replied)
    between = of_study(2, Opened('1', 'between', PAIR))
    found = snapshot(numbered(events[:place], between, events[place:]), 'live', {})
    id_of = {number: id for id, number in found.events.items()}
    assert found.configs[id_of[place + 2]] == 'config-1'
    later = [config for id, config in found.configs.items() if id.startswith(name) and id != id_of[place + 2]]
    assert 'between' in later
