"""Rehearsals go through real pages, and their accounts find whatever the store has otherwise."""

import asyncio
import collections
import dataclasses
import random

import pytest

from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.study.events import Asked, Concluded, Preferred, Replied, Retried, Stored
from simrl.study.settings import TaskSettings
from simrl.study.store import read_events
from tests.remote.server import ScriptedServer, chat_reply
from tests.study.pages import settings_of, site
from tools.rehearse.account import differences
from tools.rehearse.pages import read_page
from tools.rehearse.people import TRIES, Modelled
from tools.rehearse.run import main
from tools.rehearse.walk import Action, Habits, Walk

FIELDS = {'choice': 'a', 'reason': 'short (7)'}
REPLIED = Replied('x', 'y', '**one** two', 'three', 0.0, 0.0)
EVENTS = (Asked('hi (6)'), REPLIED, Preferred('left', 'left', 'short (7)'))
SENT = (Action('/message', {'message': 'hi (6)'}, None, 'confirmed', 0.1, 303),)
VOTED = Action('/vote', FIELDS, ('one two', 'three'), 'confirmed', 0.1, 303)


def stored(*events, participant='p'):
    return [Stored(n, participant, n, 0.0, event) for n, event in enumerate(events, 1)]


def account(actions, events):
    return differences([Walk('panel', 'p', actions=list(actions))], stored(*events))


@pytest.mark.parametrize(
    ('actions', 'events', 'said'),
    [
        ((*SENT, VOTED), EVENTS, None),
        ((*SENT, VOTED), EVENTS[:2], 'which was confirmed'),
        ((*SENT, VOTED), (*EVENTS, Retried()), 'no more than was sent'),
        ((*SENT, VOTED), (*EVENTS, EVENTS[2]), 'no more than was sent'),
        ((*SENT, dataclasses.replace(VOTED, fields={**FIELDS, 'choice': 'b'})), EVENTS, 'which was confirmed'),
        ((*SENT, dataclasses.replace(VOTED, replies=('three', 'one two'))), EVENTS, 'on the page'),
        ((*SENT, dataclasses.replace(VOTED, seen='unknown')), EVENTS, None),
        ((*SENT, dataclasses.replace(VOTED, seen='unknown')), EVENTS[:2], None),
        ((*SENT, dataclasses.replace(VOTED, seen='unknown'), VOTED), EVENTS, None),
        ((*SENT, dataclasses.replace(VOTED, seen='out of date')), EVENTS, 'no more than was sent'),
    ],
    ids=['whole', 'lost', 'nobody sent', 'doubled', 'changed', 'sides', 'stored', 'not stored', 'again', 'refused'],
)
def test_accounts_find_what_is_otherwise(actions, events, said):
    found = account(actions, events)
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_the_last_exchange_concludes_by_itself():
    events = stored(*EVENTS, Concluded())
    assert differences([Walk('panel', 'p', actions=[*SENT, VOTED])], events) == []
    events[-1] = dataclasses.replace(events[-1], at=1.0)
    assert len(differences([Walk('panel', 'p', actions=[*SENT, VOTED])], events)) == 1


def test_accounts_find_strangers_and_doubles():
    assert 'nobody' in differences([], stored(*EVENTS))[0]
    walks = [Walk(name, 'p', actions=[*SENT, VOTED]) for name in ('a', 'b')]
    assert any('another participant each' in line for line in differences(walks, stored(*EVENTS)))


@pytest.fixture(scope='module')
def rehearsed(tmp_path_factory):
    settings = settings_of(
        tmp_path_factory.mktemp('study'),
        mode='rehearsal',
        task=TaskSettings(exchanges=1, max_exchanges=2, min_words=20),
    )
    with site(settings) as place:
        yield settings.store, place.url


def test_people_who_click_twice_and_go_back_are_accounted_for(rehearsed, capsys):
    store, url = rehearsed
    habits = ('--double=.3', '--reload=.2', '--back=.3', '--device=.2', '--fail=.2', '--leave=.02')
    main([url, f'--store={store}', '--participants=6', '--least=20', *habits])
    said = capsys.readouterr().out
    assert 'out of date' in said
    assert 'nothing else' in said
    before = len(read_events(store))
    main([url, f'--store={store}', '--participants=1', '--least=20', '--seed=1'])
    assert 'participants: 1 completed' in capsys.readouterr().out
    assert len(read_events(store)) > before


def test_the_same_command_lets_participants_return(rehearsed, capsys):
    store, url = rehearsed
    command = [url, f'--store={store}', '--participants=3', '--least=20', '--seed=5']
    main([*command, '--leave=.3'])
    assert ' left at ' in capsys.readouterr().out
    main(command)
    assert 'participants: 3 completed\n' in capsys.readouterr().out


def test_who_cannot_go_on_is_an_error(rehearsed, capsys):
    store, url = rehearsed
    with pytest.raises(SystemExit, match='1 participants could not go on'):
        main([f'{url}/elsewhere', f'--store={store}', '--participants=1'])
    assert 'expected status 200, found 404' in capsys.readouterr().err


@pytest.mark.parametrize('cut', [2, TRIES])
def test_a_model_is_asked_again_for_what_cannot_be_read(cut):
    def answer(body, attempt):
        if len(server.requests) <= cut:
            return chat_reply('{"reason": "it', finish='length')
        return chat_reply('{"reason": "it is short", "choice": "b"}')

    failed = collections.Counter()
    with ScriptedServer(answer) as server, Endpoint(EndpointSettings(server.url, 'model')) as endpoint:
        vote = Modelled(endpoint, random.Random(0), 10, failed).vote('A letter', 'Help me.', 'one', 'two')
        if cut < TRIES:
            assert asyncio.run(vote) == ('b', 'it is short')
        else:
            with pytest.raises(RuntimeError, match='length'):
                asyncio.run(vote)
    assert failed == {'length': cut}


@pytest.mark.parametrize('field', ['leave', 'pace'])
def test_habits_are_chances(field):
    with pytest.raises(ValueError, match=f'--{field}: expected'):
        Habits(**{field: -1.0})


def test_a_page_of_an_error_is_none_of_a_participant():
    with pytest.raises(ValueError, match='expected the page of a participant'):
        read_page('<html><body><p>Sorry</p></body></html>')
