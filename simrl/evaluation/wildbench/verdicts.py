"""Scores and comparisons by our own judges, as rows of the benchmark's own judge files.

The prompts are ours, and so are the numbers: they are near the leaderboard's only as far as the judges agree. An empty
reply is not judged: it scores 1, and loses by far against one that is not, as in the benchmark. A row without a verdict
has the cause and the raw text, and no score or winner; `judge_files.write_verdicts` keeps it out of the judge file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from simrl.conversations.quoting import as_json
from simrl.evaluation.wildbench.asking import AskSettings, JudgePrompt, ask, kept, prompt_of, shown, task_lines
from simrl.evaluation.wildbench.generations import Generation, generator_of
from simrl.evaluation.wildbench.tasks import Task
from simrl.remote.answers import Answer
from simrl.remote.client import Endpoint
from simrl.remote.schema import Schema, object_of

VERSION = '1'  # of the prompts; goes up with every change of a word
TEXT: Schema = {'type': 'string'}
CHOICES = {'A++': ('A', 2), 'A+': ('A', 1), 'A=B': ('tie', 0), 'B+': ('B', 1), 'B++': ('B', 2)}  # winner, extent

SCORE_INSTRUCTION = """\
You grade one reply of an AI assistant. The conversation comes first, then the reply to its last message, then questions
that a good reply lets answer with yes. Let them guide you; what they leave out counts, too.
Meaning of the score:
1 to 2: the reply makes no sense, or is about something else.
3 to 4: it is about the matter, and no help with it.
5 to 6: it helps, with errors or gaps that matter.
7 to 8: it is good, and could be better.
9 to 10: nothing of weight is left to improve."""
SCORE_END = (
    'Answer with a JSON object: "strengths" and "weaknesses" of the reply, each in a few sentences, then "score", an '
    'integer from 1 to 10.'
)
PAIR_INSTRUCTION = """\
You compare two replies of AI assistants, A and B. The conversation comes first, then the two replies to its last
message, then questions that a good reply lets answer with yes. Let them guide you; what they leave out counts, too.
Which one comes first says nothing, and a reply is not better for being longer.
A++: A is much better. A+: A is slightly better. A=B: they are equally good, which is rare.
B+: B is slightly better. B++: B is much better."""
PAIR_END = (
    'Answer with a JSON object: "analysis of A" and "analysis of B", each in a few sentences, then "choice": "A++", '
    '"A+", "A=B", "B+" or "B++".'
)
SCORE_SCHEMA = object_of(strengths=TEXT, weaknesses=TEXT, score={'type': 'integer', 'minimum': 1, 'maximum': 10})
CHOICE: Schema = {'type': 'string', 'enum': list(CHOICES)}
PAIR_SCHEMA = object_of(**{'analysis of A': TEXT, 'analysis of B': TEXT, 'choice': CHOICE})


def _items(task: Task) -> list[str]:
    return [as_json({'question': text}) for text in task.checklist]


def score_prompt(task: Task, reply: str) -> JudgePrompt:
    """Asks for the score of a reply."""
    lines = [*task_lines(task), as_json({'reply': reply}), *_items(task)]
    return JudgePrompt(prompt_of(SCORE_INSTRUCTION, lines, SCORE_END), SCORE_SCHEMA, f'wildbench-score-{VERSION}')


def pair_prompt(task: Task, reply_a: str, reply_b: str) -> JudgePrompt:
    """Asks for the better of two replies."""
    lines = [*task_lines(task), as_json({'A': reply_a}), as_json({'B': reply_b}), *_items(task)]
    return JudgePrompt(prompt_of(PAIR_INSTRUCTION, lines, PAIR_END), PAIR_SCHEMA, f'wildbench-pair-{VERSION}')


def _answers(
    prompts: Sequence[JudgePrompt | dict[str, Any]],
    endpoints: Mapping[str, Endpoint],
    settings: AskSettings,
    name: str,
) -> dict[str, list[tuple[dict[str, Any] | None, dict[str, Any]]]]:
    """The values and what is kept of each, by judge; what is a value already is not asked for."""
    asked = [prompt for prompt in prompts if isinstance(prompt, JudgePrompt)]
    found = {}
    for judge, outcomes in ask(endpoints, asked, settings, name).items():
        rest = iter(outcomes)
        answers: list[tuple[dict[str, Any] | None, dict[str, Any]]] = []
        for prompt in prompts:
            if isinstance(prompt, JudgePrompt):
                outcome = next(rest)
                value = outcome.value if isinstance(outcome, Answer) else None
                answers.append((value, {'version': prompt.version, **kept(outcome)}))
            else:
                answers.append((prompt, {'version': 'an empty reply is not judged'}))
        found[judge] = answers
    return found


def score(
    tasks: Mapping[str, Task],
    generations: Mapping[str, Generation],
    endpoints: Mapping[str, Endpoint],
    settings: AskSettings,
    name: str = '',
) -> dict[str, list[dict[str, Any]]]:
    """Rows of a judge file of scores, by judge."""
    replies = {task: shown(of.text, settings) for task, of in generations.items()}
    empty = {'strengths': '', 'weaknesses': 'The reply is empty.', 'score': 1}
    prompts = [score_prompt(tasks[task], reply) if reply.strip() else empty for task, reply in replies.items()]
    return {
        judge: [
            {
                'session_id': task,
                'parsed_result': value,
                'meta_data': meta,
                'model_test': generations[task].generator,
                'score': None if value is None else value['score'],
                'model_output': replies[task],
            }
            for task, (value, meta) in zip(replies, answers, strict=True)
        ]
        for judge, answers in _answers(prompts, endpoints, settings, name).items()
    }


def pairs(
    tasks: Mapping[str, Task],
    generations: Mapping[str, Generation],
    references: Mapping[str, Generation],
    endpoints: Mapping[str, Endpoint],
    settings: AskSettings,
    name: str = '',
) -> dict[str, list[dict[str, Any]]]:
    """Rows of a judge file of pairs, by judge: each task that both have a reply to in both orders, one after the other.

    Raises:
        ValueError: both are of one name, by which the files tell them apart; or they have no task in common.
    """
    common = [task for task in generations if task in references]
    if not common:
        raise ValueError('expected at least one task with replies of both assistants, found none')
    names = [generator_of(side) for side in (generations, references)]
    if names[0] == names[1]:
        raise ValueError(f'generator: expected two assistants of different names, found {names[0]!r} twice')
    ordered = [
        (task, a[task], b[task]) for task in common for a, b in ((generations, references), (references, generations))
    ]
    replies = [(shown(a.text, settings), shown(b.text, settings)) for _, a, b in ordered]
    prompts = [
        _empty_pair(*reply) or pair_prompt(tasks[task], *reply)
        for (task, _, _), reply in zip(ordered, replies, strict=True)
    ]
    found = {}
    for judge, answers in _answers(prompts, endpoints, settings, name).items():
        rows = []
        for (task, a, b), (reply_a, reply_b), (value, meta) in zip(ordered, replies, answers, strict=True):
            by_letter = {'A': a.generator, 'B': b.generator, 'tie': 'tie'}
            winner, extent = (None, None) if value is None else CHOICES[value['choice']]
            rows.append(
                {
                    'session_id': task,
                    'parsed_result': value,
                    'meta_data': meta,
                    'model_A': a.generator,
                    'model_B': b.generator,
                    'winner': None if winner is None else by_letter[winner],
                    'extent': extent,
                    'model_outputs': {a.generator: reply_a, b.generator: reply_b},
                }
            )
        found[judge] = rows
    return found


def _empty_pair(reply_a: str, reply_b: str) -> dict[str, Any] | None:
    """The verdict on a pair with an empty reply; None for another pair."""
    a, b = not reply_a.strip(), not reply_b.strip()
    if not (a or b):
        return None
    return {'analysis of A': '', 'analysis of B': '', 'choice': 'A=B' if a and b else 'B++' if a else 'A++'}
