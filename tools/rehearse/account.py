"""Answers that participants saw confirmed, held against the store: none lost, none doubled, none that nobody sent."""

import collections
from collections.abc import Iterable, Mapping, Sequence

from simrl.study.events import (
    STUDY,
    Asked,
    Checked,
    Concluded,
    Consented,
    Event,
    Instructed,
    Preferred,
    Prepared,
    Replied,
    Retried,
    Stored,
    Wrote,
)
from simrl.study.render import to_html
from tools.rehearse.pages import words_of
from tools.rehearse.walk import Action, Walk

Content = tuple[object, ...]  # of an action or of its event: the same where one is the other's
CHOICES = {'a': 'left', 'tie': 'tie', 'b': 'right'}


def differences(walks: Iterable[Walk], events: Sequence[Stored]) -> list[str]:
    """Differences of the store from what the participants saw, a line each.

    Args:
        walks: of all participants of the store.
        events: all of the store.
    """
    stored: dict[str, list[Event]] = collections.defaultdict(list)
    at: dict[str, float] = {}
    for event in events:
        # The last exchange that a conversation may have concludes it, in the same write.
        concludes = isinstance(event.event, Concluded) and at.get(event.participant) == event.at
        if event.participant != STUDY and not concludes:
            stored[event.participant].append(event.event)
        at[event.participant] = event.at
    found: list[str] = []
    by_id = collections.defaultdict(list)
    for walk in walks:
        by_id[walk.id].append(walk.panel_id)
        if walk.id:
            found += [f'{walk.panel_id} ({walk.id}): {line}' for line in _differences(walk, stored.pop(walk.id, []))]
        elif any(action.seen == 'confirmed' for action in walk.actions):
            found.append(f'{walk.panel_id}: expected an id, found none')
    found += [f'{ids}: expected another participant each, found {id}' for id, ids in by_id.items() if id and ids[1:]]
    found += [f'{id}: expected somebody who walked, found nobody' for id in stored]
    return found


def _differences(walk: Walk, events: Sequence[Event]) -> list[str]:
    expected = [content for event in events if (content := _content_of_event(event)) is not None]
    places = {0}  # numbers of events that the actions so far may have come to
    for action in walk.actions:
        content = _content_of_action(action)
        if content is None or action.seen not in ('confirmed', 'unknown'):
            continue
        reached = {place + 1 for place in places if place < len(expected) and expected[place] == content}
        places = reached if action.seen == 'confirmed' else places | reached
        if not places:
            return [f'expected {content}, which was confirmed, found {expected}']
    found = [] if len(expected) in places else [f'expected no more than was sent, found {expected[max(places) :]}']
    return found + _misplaced(walk, events)


def _misplaced(walk: Walk, events: Sequence[Event]) -> list[str]:
    """Replies that were shown otherwise than the store has them, at the votes that were confirmed."""
    shown: Mapping[str, tuple[str, str]] = {
        action.fields['reason']: action.replies
        for action in walk.actions
        if action.path == '/vote' and action.seen == 'confirmed' and action.replies
    }
    found, replied = [], None
    for event in events:
        if isinstance(event, Replied):
            replied = event
        if isinstance(event, Preferred) and replied is not None and event.reason in shown:
            sides = tuple(words_of(str(to_html(text))) for text in (replied.left_text, replied.right_text))
            if sides != shown[event.reason]:
                found.append(f'{event.reason!r}: expected replies {sides}, found {shown[event.reason]} on the page')
    return found


def _content_of_action(action: Action) -> Content | None:
    """None of what is no event."""
    fields = action.fields
    match action.path:
        case '/consent':
            return 'consent', fields['agreed'] == 'yes'
        case '/instructions':
            return ('instructions',)
        case '/check':
            return 'check', tuple(int(fields[name]) for name in sorted(fields) if name.startswith('answer_'))
        case '/task':
            return 'task', fields['task'], tuple(fields[name] for name in sorted(fields) if name.startswith('note_'))
        case '/message':
            return 'message', fields['message']
        case '/retry':
            return ('retry',)
        case '/vote':
            return 'vote', CHOICES[fields['choice']], fields['reason']
        case '/conclude':
            return ('conclude',)
        case '/text':
            return 'text', fields['text']
    return None


def _content_of_event(event: Event) -> Content | None:
    match event:
        case Consented(agreed):
            return 'consent', agreed
        case Instructed():
            return ('instructions',)
        case Checked(answers):
            return 'check', answers
        case Prepared(task, notes):
            return 'task', task, notes
        case Asked(message):
            return 'message', message
        case Retried():
            return ('retry',)
        case Preferred(choice, _, reason):
            return 'vote', choice, reason
        case Concluded():
            return ('conclude',)
        case Wrote(text):
            return 'text', text
    return None
