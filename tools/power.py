"""Sample sizes: how many people, and how many training seeds, until a win rate is told from 50%.

    python -m tools.power [--win-rate=0.58] [--power=0.8] [--ties=0.2] [--turns=5] [--icc=0.1] [--people=283] [--check]

Two questions, two numbers. Of one checkpoint: would other people prefer it? Its interval is over people. Of a
simulator: would another training seed, judged by other people, be preferred? That interval is over both at once, and
no number of people makes up for too few seeds. `--check` confirms each number by simulated studies.
"""

import argparse
from collections.abc import Sequence

from simrl.evaluation import power as power_lib
from simrl.evaluation.power import Design
from simrl.run.program import run_program

DEFAULT = Design()
SEEDS = (2, 3, 4, 5, 8, 12, 16)


def parser() -> argparse.ArgumentParser:
    summary, _, text = (__doc__ or '').partition('\n\n')
    found = argparse.ArgumentParser('python -m tools.power', description=f'{summary}\n\n{text}')
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    for field, kind, words in (
        ('win_rate', float, 'the true win rate, ties count 1/2'),
        ('ties', float, 'share of judgements that are ties'),
        ('turns', int, 'judgements of each person'),
        ('icc', float, 'intra-class correlation: that of two judgements of one person'),
        ('seed_sd', float, 'standard deviation of the true win rate between training seeds'),
        ('arms', int, 'arms with the same training seeds, whose spread over seeds is pooled; 1: the arm alone'),
        ('level', float, 'nominal coverage of the intervals'),
    ):
        default = getattr(DEFAULT, field)
        found.add_argument(f'--{field.replace("_", "-")}', type=kind, default=default, help=f'{words} ({default:g})')
    found.add_argument('--power', type=float, default=0.8, help='probability that the interval excludes 50%% (0.8)')
    found.add_argument('--people', type=int, help='also the power, and the seeds needed, with this many people')
    seeds = ' '.join(map(str, SEEDS))
    found.add_argument('--seeds', type=int, nargs='+', default=SEEDS, help=f'numbers of training seeds ({seeds})')
    found.add_argument('--check', action='store_true', help='confirm each number by simulation, which takes a minute')
    found.add_argument('--studies', type=int, default=2000, help='simulated studies with --check (2000)')
    return found


def report(design: Design, options: argparse.Namespace) -> str:
    """The table, as text.

    Raises:
        ValueError: as the functions of `simrl.evaluation.power`.
    """
    people = power_lib.people_needed(design, power=options.power)

    def checked(number: int, seeds: int | None = None) -> str:
        if not options.check:
            return ''
        found = power_lib.simulated_power(design, number, seeds, studies=options.studies)
        return f'   {found:.1%} of {options.studies:,} simulated studies'

    spread = f', spread pooled over {design.arms} arms' if design.arms > 1 else ''
    lines = [
        f'A win rate of {design.win_rate:.1%} told from 50% with a power of {options.power:.0%} by {design.level:.0%} '
        'intervals.',
        f'Judgements: {design.ties:.0%} ties; {design.turns} a person, which correlate at {design.icc:g}: '
        f'{power_lib.design_effect(design):.2f} times as many as independent ones.',
        '',
        f'One checkpoint, interval over people: {people:,} people ({people * design.turns:,} judgements)'
        f'{checked(people)}',
        '',
        f'A simulator, interval over training seeds and people; seeds differ by {design.seed_sd:g} (sd){spread}:',
        f'{"seeds":>7}{"people":>12}{"power":>9}',
    ]
    for seeds in options.seeds:
        try:
            number = power_lib.people_needed(design, power=options.power, seeds=seeds)
        except power_lib.UnreachableError as error:
            lines.append(f'{seeds:>7}{"–":>12}{error.best:>9.1%}   at most, with any number of people')
            continue
        found = power_lib.crossed_power(design, number, seeds)
        lines.append(f'{seeds:>7}{number:>12,}{found:>9.1%}{checked(number, seeds)}')
    if options.people is not None:
        alone = power_lib.checkpoint_power(design, options.people)
        lines += ['', f'With {options.people:,} people: of one checkpoint a power of {alone:.1%};']
        try:
            seeds = power_lib.seeds_needed(design, options.people, power=options.power)
        except power_lib.UnreachableError as error:
            lines.append(f'of a simulator none: {error}')
        else:
            found = power_lib.crossed_power(design, options.people, seeds)
            lines.append(
                f'of a simulator {found:.1%} with {seeds} training seeds, the fewest that suffice'
                f'{checked(options.people, seeds)}'
            )
    return '\n'.join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parser()
    options = flags.parse_args(arguments)
    try:
        fields = ('win_rate', 'ties', 'turns', 'icc', 'seed_sd', 'arms', 'level')
        print(report(Design(**{field: getattr(options, field) for field in fields}), options))
    except ValueError as error:
        flags.error(str(error))


if __name__ == '__main__':
    run_program(main)
