"""The sections of a simulator's card on what failed with it, and what it cost."""

from simrl.evaluation.card import Cost, SimulatorCard, Training
from simrl.evaluation.report import page
from simrl.evaluation.report.summary import end_words, share

NOT_MEASURED = 'not measured'
HELD = (
    'Conversations of the evaluation, of all assistants together. One without a score is in none of the other numbers. '
)
TRAINING = 'Means over {lines:,} logged lines of {runs} training {run}. '
COUNTS = {
    'later_messages': 'messages after the first',
    'repeated': 'of them verbatim repeats',
    'resampled': 'messages that were sampled again',
    'missed_signals': 'missed end signals',
}
METRICS = {  # of training, and their names on the page
    'reward/unjudged': 'conversations without a reward',
    'rollout/end_failure': 'conversations that a failure ended',
    'rollout/end_signal': 'conversations that it ended',
    'rollout/truncated_user': 'messages that reached max_new_tokens',
    'rollout/repeated_user': 'messages that repeat its one before',
    'rollout/resampled_user': 'messages sampled again, for each that it sent',
    'rollout/missed_signals': 'missed end signals, for each conversation',
}


def conversations(card: SimulatorCard) -> list[str]:
    found = card.conversations
    if found is None:
        return [page.heading('In the evaluation'), absent(card.not_measured['failures in the evaluation'])]
    lost, judged = sum(found.causes.values()), sum(found.ends.values())
    rows: list[tuple[str, str]] = [
        ('conversations', f'{found.held:,}'),
        ('without a score', _of(lost, found.held)),
        *((f'because of: {cause}', f'{count:,}') for cause, count in found.causes.items()),
        *((f'ended: {end_words(end)}', _of(count, judged)) for end, count in found.ends.items()),
        ('with a message that reached max_new_tokens', _of(found.truncated, judged)),
        *(
            (words, f'{found.counts[name]:,}' if name in found.counts else NOT_MEASURED)
            for name, words in COUNTS.items()
        ),
    ]
    return [page.heading('In the evaluation'), page.table(('', 'value'), rows), page.paragraph(HELD, 'note')]


def training(card: SimulatorCard) -> list[str]:
    found = card.training
    if found is None:
        why = card.not_measured.get('failures in training') or card.not_measured['utility']
        return [page.heading('In training'), absent(why)]
    rows = [
        (words, f'{found.rates[metric]:.2%}' if metric in found.rates else NOT_MEASURED)
        for metric, words in METRICS.items()
    ]
    note = TRAINING.format(lines=found.lines, runs=found.runs, run='run' if found.runs == 1 else 'runs')
    return [page.heading('In training'), page.table(('', 'share'), rows), page.paragraph(note, 'note')]


def cost(cost: Cost, training: Training | None) -> list[str]:
    stages = [(stage, f'{seconds:,.1f}') for of in cost.seconds.values() for stage, seconds in of.items()]
    rows = [
        (purpose, str(len(of)), f'{sum(of.values()):,.1f}') if of else (purpose, '0', NOT_MEASURED)
        for purpose, of in cost.seconds.items()
    ]
    waiting = [stage for of in cost.unfinished.values() for stage in of]
    unfinished = f'Not finished: {", ".join(waiting)}. ' if waiting else ''
    parts = [
        page.table(('seconds of work', 'finished stages', 'seconds'), rows),
        page.paragraph(f'{unfinished}Stages run side by side take less time; other arms share some of them.', 'note'),
        page.details(f'{len(stages)} stages', page.table(('stage', 'seconds'), stages)),
    ]
    if training is None:
        return parts
    if not training.usage:
        return [*parts, page.paragraph('Training against it used no endpoint that was counted.', 'note')]
    names = list(dict.fromkeys(name for of in training.usage.values() for name in of))
    used = [(model, *(f'{of.get(name, 0):,.6g}' for name in names)) for model, of in training.usage.items()]
    note = (
        'Usage of endpoints in training, by model: the simulator’s and those of judges. What the evaluation used is '
        'printed by its stages, and not kept.'
    )
    header = ('endpoint', *(name.replace('_', ' ') for name in names))
    return [*parts, page.table(header, used), page.paragraph(note, 'note')]


def absent(why: str) -> str:
    return page.paragraph(f'{NOT_MEASURED.capitalize()}: {why}.')


def _of(part: int, whole: int) -> str:
    return f'{part:,} of {whole:,} ({share(part / whole)})' if whole else f'{part:,}'
