"""A simulator's measures, or people's alone, as lines of text."""

from collections.abc import Sequence

from simrl.evaluation.fidelity.behaviour import LEAKED_WORDS
from simrl.evaluation.fidelity.measure import SourceFidelity
from simrl.evaluation.statistics import Estimate

ABOUT = (
    'Distances are between random halves of the conversations: people from people (the floor), the simulator from '
    'people. Their difference, the excess, is 0 for one that says what people say; its 95% interval resamples '
    'conversations. Word length: letters; typo rate: share of words; others: bits (Jensen-Shannon), or the energy '
    'distance of sentence embeddings. Ends are of conversations that people ended. Intent overlap: the share of a '
    'message’s content words that the intent has. Intent leaked: the share of messages with '
    f'{LEAKED_WORDS} words of the intent in a row, or with all words of a shorter one. Intent covered: the share of '
    'the intent’s content words that a user says in the whole conversation. Diversity of openings: 1 less the share of '
    'words that two openings have in common, of all words of both; the mean over pairs.'
)
Line = tuple[str, str, str, str]  # name, people, simulated, excess


def lines_of(found: SourceFidelity) -> list[Line]:
    """The measures of one source, a line each."""
    lines = [
        (
            name,
            f'{value.people:.4f}',
            '' if value.simulated is None else f'{value.simulated:.4f}',
            '' if value.excess is None else f'{value.excess.mean:+.4f} {value.excess.bounds_text(4)}',
        )
        for name, value in found.distances.items()
    ]
    lines += [(name, _estimate(rate.people), _estimate(rate.simulated), '') for name, rate in found.rates.items()]
    if (ends := found.termination) is not None:
        basis = f'{ends.num_ends:,} ends in {ends.num_turns:,} turns'
        lines += [
            ('ends: precision', basis, _estimate(ends.precision), ''),
            ('ends: recall', '', _estimate(ends.recall), ''),
            ('ends: F1', f'always ending {ends.always:.3f}', _estimate(ends.f1), ''),
        ]
    return lines


def about(found: SourceFidelity) -> str:
    """The numbers of turns, and what is left out or not measured, as sentences."""
    left_out = ', '.join(f'{reason} ({number:,})' for reason, number in found.left_out.items())
    parts = [
        f'{found.num_turns:,} turns of {found.num_conversations:,} conversations; distances are of '
        f'{found.num_compared:,}{f", without those where {left_out}" if left_out else ""}.'
    ]
    if found.termination is not None or 'ends' in found.not_measured:
        scored = found.termination.num_conversations if found.termination else 0
        parts.append(
            f'Ends are of {scored:,} conversations: of {found.ends_unknown:,} others the end is not natural, of '
            f'{found.ends_incomplete:,} not all turns were replayed.'
        )
    for reason in dict.fromkeys(found.not_measured.values()):
        names = ', '.join(name for name, why in found.not_measured.items() if why == reason)
        parts.append(f'Not measured: {names}: {reason}.')
    return ' '.join(parts)


def text_table(header: Line, lines: Sequence[Line]) -> str:
    """Lines under a header, in columns; those without a number are left out."""
    used = [column for column in range(len(header)) if any(line[column] for line in lines)]
    widths = [max(len(line[column]) for line in (header, *lines)) for column in used]
    return '\n'.join(
        '  '.join(line[column].ljust(width) for column, width in zip(used, widths, strict=True)).rstrip()
        for line in (header, *lines)
    )


def _estimate(estimate: Estimate | None) -> str:
    return '' if estimate is None else f'{estimate.mean:.3f} {estimate.bounds_text()}'
