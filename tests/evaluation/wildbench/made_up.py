"""Tasks, replies and judges that are made up, for tests of WildBench."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from simrl.evaluation.wildbench.tasks import GROUPS, Task, parse_task
from tests.remote.server import Body, chat_reply

TAGS = sorted(GROUPS)


def task_row(number: int, *, items: int = 3, turns: int = 1, **changes: Any) -> dict[str, Any]:
    """A row in WildBench's schema."""
    messages = []
    for turn in range(turns):
        messages += [{'role': 'user', 'content': f'Question {number}.{turn}?', 'language': 'English', 'toxic': False}]
        messages += [{'role': 'assistant', 'content': f'Answer {number}.{turn}.'}]
    row = {
        'id': f'task{number}',
        'session_id': f'task{number}',
        'conversation_input': messages[:-1],
        'checklist': [f'Does it do thing {item} of {number}?' for item in range(items)],
        'primary_tag': TAGS[number % len(TAGS)],
        'secondary_tags': [TAGS[(number * 5 + 1) % len(TAGS)]],
        'intent': 'unknown',
    }
    return row | changes


def task(number: int, **changes: Any) -> Task:
    return parse_task(task_row(number, **changes))[0]


def tasks_of(*tasks: Task) -> dict[str, Task]:
    return {one.id: one for one in tasks}


def material(body: dict[str, Any]) -> list[Any]:
    """The JSON lines of a judge's prompt."""
    lines = body['messages'][0]['content'].splitlines()
    return [json.loads(line) for line in lines if line.startswith(('{', '['))]


def pick(options: Sequence[str], *of: object) -> str:
    """One of the options, by a hash of what it is for."""
    digest = hashlib.sha256(json.dumps(of).encode()).digest()
    return options[digest[0] % len(options)]


def verdict_of(judge: str, question: str, reply: str) -> str:
    """The verdict of a made-up judge on an item."""
    return pick(('yes', 'yes', 'partly', 'no'), judge, question, reply)


def checklist_answer(body: dict[str, Any]) -> str:
    """The text of a made-up judge's answer."""
    found = material(body)
    (reply,) = (line['reply'] for line in found if 'reply' in line)
    items = [line for line in found if 'question' in line]
    return json.dumps(
        {
            'items': [
                {'item': of['item'], 'thought': 't', 'verdict': verdict_of(body['model'], of['question'], reply)}
                for of in items
            ]
        }
    )


def score_of(judge: str, reply: str) -> int:
    return int(pick([str(i) for i in range(1, 11)], judge, reply))


def choice_of(judge: str, a: str, b: str) -> str:
    return pick(('A++', 'A+', 'A=B', 'B+', 'B++'), judge, a, b)


def script(body: dict[str, Any], attempt: int) -> Body:
    """Assistants reply, and judges judge, whichever is asked."""
    if 'response_format' not in body:
        return chat_reply(f'{body["model"]} on {body["messages"][-1]["content"]}')
    properties = body['response_format']['json_schema']['schema']['properties']
    if 'items' in properties:
        return chat_reply(checklist_answer(body))
    shown = {name: text for line in material(body) for name, text in line.items()}
    if 'score' in properties:
        value: dict[str, Any] = {'strengths': 's', 'weaknesses': 'w', 'score': score_of(body['model'], shown['reply'])}
    else:
        choice = choice_of(body['model'], shown['A'], shown['B'])
        value = {'analysis of A': 'a', 'analysis of B': 'b', 'choice': choice}
    return chat_reply(json.dumps(value))


def numbered(text: str) -> int:
    """The number of a made-up task in a text."""
    found = re.search(r'Question (\d+)\.', text)
    assert found
    return int(found[1])
