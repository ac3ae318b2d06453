"""conversations.html: the conversations that a run kept, to filter, sort and read; one file that needs no other.

1. `talks_of` has those of the evaluation, the same examples with every assistant, and those of training, of which each
   logged step keeps some (`compute.loop.saved_conversations`).
2. `browse_page` stores them as JSON in the page. Its script (`browse_script`) draws 50 at a time.

The text of models and people is data: JSON with every '<' escaped, which the script puts into the page as text alone.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simrl.conversations.row_files import decode_row
from simrl.evaluation.report import page
from simrl.evaluation.report.browse_script import SCRIPT, STYLE
from simrl.evaluation.report.drawing import Look
from simrl.evaluation.report.summary import end_words, traits_text
from simrl.evaluation.results.files import Results
from simrl.rewards.rewards import CAUSES
from simrl.run.stage_files import WorkdirError

REPORT_FILE, BROWSE_FILE = 'report.html', 'conversations.html'
TITLE = 'Conversations'
TRAINING = 'training'
MOST = 20_000  # conversations of training on the page; of more, every second, every third ...


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation on the page.

    Attributes:
        source: the measure's title, or `TRAINING`.
        assistant: its name.
        step: of training; None in an evaluation.
        example: the id of what it starts from.
        end: reason for ending, in words.
        score: the mean where the reward is one for each message; None without one.
        parts: further numbers: of the conversation, or one for each message of the assistant.
        messages: (role, text).
        notes: (name, text) of what else is known: the intent, what the simulator was told, why there is no reward.
    """

    source: str
    assistant: str
    step: int | None
    example: str
    end: str
    score: float | None
    parts: Mapping[str, Any]
    messages: Sequence[tuple[str, str]]
    notes: Sequence[tuple[str, str]]


def evaluation_talks(results: Results) -> Iterator[Talk]:
    """Conversations that the results show."""
    for name, examples in results.conversations.measures.items():
        for example in examples:
            notes = [('intent', example.intent)] if example.intent else []
            notes += [('traits', traits_text(example.traits))] if example.traits else []
            for assistant, found in example.conversations.items():
                yield Talk(
                    source=results.measures[name].words.title,
                    assistant=assistant,
                    step=None,
                    example=example.example,
                    end=end_words(found.end),
                    score=found.score,
                    parts=found.parts,
                    messages=[(message.role, message.content) for message in found.messages],
                    notes=notes,
                )


def training_talks(assistant: str, path: pathlib.Path) -> list[Talk]:
    """Conversations that an assistant's training kept; none without a file.

    Raises:
        WorkdirError: a line is no conversation; it names the line.
    """
    if not path.exists():
        return []
    talks = []
    with path.open('rb') as file:
        for number, line in enumerate(file, start=1):
            try:
                talks.append(_training_talk(assistant, decode_row(line)))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise WorkdirError(
                    f'{path}, line {number}: expected a conversation of training, found {error!r}'
                ) from error
    return talks


def _training_talk(assistant: str, row: Mapping[str, Any]) -> Talk:
    rewards = row['reward'] if isinstance(row['reward'], list) else [row['reward']]
    known = [float(reward) for reward in rewards if reward is not None]
    cause = row.get('failure') or CAUSES[row['cause']]
    notes = [('no reward', cause)] if cause else []
    if row.get('told'):
        notes.append(('the simulator was told', str(row['told'])))
    return Talk(
        source=TRAINING,
        assistant=assistant,
        step=int(row['step']),
        example=str(row['example']),
        end=end_words(str(row['end_reason'])),
        score=sum(known) / len(known) if known else None,
        parts=({'reward': rewards} if len(rewards) > 1 else {}) | row['parts'],
        messages=[(str(message['role']), str(message['content'])) for message in row['messages']],
        notes=notes,
    )


def browse_page(results: Results, kept: Mapping[str, pathlib.Path], looks: Mapping[str, Look]) -> str:
    """The page.

    Args:
        kept: by assistant, the file of conversations of its training.
        looks: of the assistants.

    Raises:
        WorkdirError: a line of a file is no conversation.
    """
    shown = list(evaluation_talks(results))
    trained = [talk for assistant, path in kept.items() for talk in training_talks(assistant, path)]
    every = max(1, -(-len(trained) // MOST))
    talks = [*shown, *trained[::every]]
    missing = sorted(str(path) for path in kept.values() if not path.exists())
    about = [f'{len(shown):,} conversations of the evaluation, {len(talks) - len(shown):,} of training.']
    if every > 1:
        about.append(f'Of the {len(trained):,} that training kept the page has one of every {every}.')
    if missing:
        about.append(f'Not there: {", ".join(missing)}.')
    experiment = results.experiment
    of_run = {name: {'arm': run.arm, 'seed': run.seed} for name, run in experiment.runs.items()}
    data = {
        'assistants': {
            name: of_run.get(name, {'arm': name, 'seed': None}) | {'colour': looks[name].colour}
            for name in dict.fromkeys(talk.assistant for talk in talks)
        },
        'talks': [dataclasses.asdict(talk) for talk in talks],
    }
    body = [
        f'<style>{STYLE}</style>',
        f'<h1>{TITLE}</h1>',
        page.link(REPORT_FILE, 'The report of this run'),
        page.paragraph(' '.join(about), 'note'),
        *filtered('conversations', data),
    ]
    return page.document(TITLE, body, SCRIPT)


def filtered(what: str, data: Any) -> list[str]:
    """The parts of a page whose script (`browse_script.script_of`) fills them with data."""
    above, below = (f'<nav class="pages" aria-label="Pages, {where} the list"></nav>' for where in ('above', 'below'))
    return [
        f'<noscript><p>This page needs its script to show {what}.</p></noscript>',
        '<form id="filters"></form>\n<p id="found" class="note" role="status"></p>',
        f'{above}\n<div id="talks"></div>\n{below}',
        f'<script type="application/json" id="data">{as_json(data)}</script>',
    ]


def as_json(data: Any) -> str:
    """JSON for an element `<script type="application/json">`: ASCII, and no '<' that could end it."""
    return json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
