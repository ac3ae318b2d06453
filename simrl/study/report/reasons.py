"""reasons.html: every vote with its replies and the reason given, to filter and read; one file that needs no other.

Names of models stand beside the replies: it is for those who read the results, not for those who run the study.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from simrl.evaluation.report import page
from simrl.evaluation.report.browse import filtered
from simrl.evaluation.report.browse_script import STYLE, script_of
from simrl.evaluation.report.drawing import SOFT, look_at
from simrl.study.analysis import PRIMARY
from simrl.study.flags import Flag
from simrl.study.report.page import REPORT_FILE
from simrl.study.texts import number_of
from simrl.study.votes import Vote

TITLE = 'Votes and their reasons'
SCRIPT = script_of("""
  const votes = data.votes;
  const any = (read) => distinct(votes.flatMap(read)).sort();
  choice('pair', 'Pair', plain(any((x) => x.pair)), 'every pair');
  choice('preferred', 'Preferred', plain(any((x) => x.preferred)), 'any');
  choice('side', 'Side', plain(['left', 'tie', 'right']), 'any');
  choice('type', 'Document type', plain(any((x) => x.type)), 'every type');
  choice('task', 'Task', plain(any((x) => x.task)), 'every task');
  choice('turn', 'Turn', plain(distinct(votes.map((x) => x.turn)).sort((a, b) => a - b)), 'every turn');
  choice('flag', 'Flag', [['none', 'none'], ...plain(any((x) => x.flags))], 'any or none');
  choice('counted', 'Analysis', [['yes', 'in it'], ['no', 'left out']], 'all votes');
  const length = (x) => x.reason.length;
  const longest = (x) => Math.max(...x.replies.map((y) => y.text.length));
  const keys = {order: () => 0, reason: length, reply: longest, seconds: (x) => x.seconds, turn: (x) => x.turn};
  sorting([['order', 'as they come'], ['reason', 'length of the reason'], ['reply', 'length of the longer reply'],
    ['seconds', 'seconds to the vote'], ['turn', 'turn']]);
  searching('words of a reason, a message, a reply; a participant');

  const passes = (x, value) => (!value.pair || x.pair === value.pair)
    && (!value.preferred || x.preferred === value.preferred)
    && (!value.side || x.side === value.side)
    && (!value.type || x.type === value.type)
    && (!value.task || x.task === value.task)
    && (!value.turn || String(x.turn) === value.turn)
    && (!value.flag || (value.flag === 'none' ? !x.flags.length : x.flags.includes(value.flag)))
    && (!value.counted || x.counted === (value.counted === 'yes'));
  const open = (details, x) => {
    const bubbles = element('div', 'bubbles');
    bubbles.append(bubble('user', 'participant', x.message));
    for (const reply of x.replies) bubbles.append(bubble('assistant', reply.about, reply.text));
    details.append(bubbles, element('p', 'reason', x.reason ? '\\u201c' + x.reason + '\\u201d' : 'No reason.'));
    for (const text of x.notes) details.append(element('p', 'note', text));
  };
  const row = (x) => folded(data.colours[x.preferred], [
    ['name', x.preferred],
    ['score', x.side],
    ['end', 'turn ' + x.turn],
    ['', x.type],
    ['first', x.reason || x.message],
  ], (details) => open(details, x));
  const texts = (x) => [x.id, x.reason, x.message, ...x.replies.map((y) => y.text)];
  show(votes, {keys, texts, passes, row});
""")


def reasons_page(
    samples: Mapping[str, Sequence[Vote]],
    votes: Sequence[Vote],
    names: Mapping[str, str],
    flags: Mapping[str, Sequence[Flag]],
) -> str:
    """The page.

    Args:
        samples: of `analysis.samples_of`.
        votes: all votes.
        names: titles of document types and tasks by id.
        flags: by participant.
    """
    counted = {vote.id for vote in samples[PRIMARY]}
    models = list(dict.fromkeys(model for vote in votes for model in vote.pair))
    data = {
        'colours': {'tie': SOFT} | {model: look_at(position).colour for position, model in enumerate(models)},
        'votes': [_row(vote, vote.id in counted, names, flags.get(vote.participant, ())) for vote in votes],
    }
    about = (
        f'{number_of(len(votes), "vote")}, {len(counted):,} of them in the analysis. The line of each has the model '
        'that was preferred, its side, the turn, the document type, and the reason.'
    )
    body = [
        f'<style>{STYLE}</style>',
        '<style>.reason { font-weight: 600; }</style>',
        f'<h1>{TITLE}</h1>',
        page.link(REPORT_FILE, 'The report of this study'),
        page.paragraph(about, 'note'),
        *filtered('votes', data),
    ]
    return page.document(TITLE, body, SCRIPT)


def _row(vote: Vote, counted: bool, names: Mapping[str, str], flags: Sequence[Flag]) -> dict[str, Any]:
    preferred = {'left': vote.left, 'tie': 'tie', 'right': vote.right}[vote.choice]
    replies = []
    for side, model, text, seconds, cut in (
        ('left', vote.left, vote.left_text, vote.left_seconds, vote.left_cut),
        ('right', vote.right, vote.right_text, vote.right_seconds, vote.right_cut),
    ):
        facts = [model, side, f'{seconds:.1f} s', *(['cut'] if cut else [])]
        facts += ['the conversation continues from it'] if vote.kept == side else []
        facts += ['may name its model'] if side in vote.named else []
        replies.append({'about': ', '.join(facts), 'text': text})
    notes = [f'{vote.id}; {names.get(vote.task, vote.task)}; {vote.judged_at - vote.shown_at:.0f} s to the vote']
    pasted = vote.message_conduct.pasted, vote.reason_conduct.pasted
    if any(pasted):
        notes.append(f'Pasted characters: {pasted[0]:,} of the message, {pasted[1]:,} of the reason.')
    notes += [f'Flag of the participant: {flag.flag.replace("_", " ")}: {flag.reason}.' for flag in flags]
    if not counted:
        notes.append(f'Left out of the analysis: {_left_out(vote)}.')
    return {
        'id': vote.id,
        'pair': ':'.join(vote.pair),
        'preferred': preferred,
        'side': vote.choice,
        'type': names.get(vote.document_type, vote.document_type),
        'task': names.get(vote.task, vote.task),
        'turn': vote.turn,
        'flags': list(vote.flags),
        'counted': counted,
        'seconds': round(vote.judged_at - vote.shown_at, 1),
        'message': vote.message,
        'replies': replies,
        'reason': vote.reason,
        'notes': notes,
    }


def _left_out(vote: Vote) -> str:
    if vote.outcome != 'completed':
        return f'the participant did not complete ({vote.outcome or "under way, or not seen again"})'
    return 'a flag' if vote.excluded is None else f'excluded by an administrator: {vote.excluded or "no reason given"}'
