"""All figures of a run, by section of its page, and their files."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from simrl.evaluation.report import drawing, figures, judge_figures, lengths, summary, utility, wildbench
from simrl.evaluation.report.drawing import Drawing, Look
from simrl.evaluation.results.files import Added, Results
from simrl.run.stage_files import named_errors

FIGURES_FOLDER = 'figures'


def drawings_of(results: Results, looks: Mapping[str, Look], added: Added | None = None) -> dict[str, list[Drawing]]:
    """The figures of each section: 'measure/NAME', 'ends/NAME', 'utility', 'training', 'lengths' and 'matrix'.

    Of what tools have added: 'judges/FOLDER' and 'wildbench'.
    """
    found: dict[str, list[Drawing]] = {}
    captions = []
    for name, measure in results.measures.items():
        rows = summary.rows_of(results.experiment, measure)
        sample = summary.sample(measure, rows)
        caption = f'{sample} {summary.basis(rows, measure.words.unit)}'
        captions.append(caption)
        found[f'measure/{name}'] = [
            figures.win_rates(f'win_rate_{name}', rows, looks, caption),
            figures.scores(f'score_{name}', rows, measure.words.score, looks, caption),
        ]
        found[f'ends/{name}'] = [lengths.ends(f'ends_{name}', rows, sample)]
    found['utility'] = utility.drawings(results, looks, captions[0])
    found['training'] = figures.training_curves(results, looks)
    found['lengths'] = lengths.drawings(results, looks)
    found['matrix'] = [] if results.matrix is None else [figures.matrix(results.experiment, results.matrix)]
    if added and added.judges:
        found |= {f'judges/{name}': drawn for name, drawn in judge_figures.drawings(added.judges, looks).items()}
    if added and added.wildbench:
        found['wildbench'] = wildbench.drawings(added.wildbench)
    return found


def pngs(found: Mapping[str, Sequence[Drawing]]) -> dict[str, bytes]:
    """The figures as PNG files, by name."""
    return {one.name: drawing.png(one) for drawings in found.values() for one in drawings}


def write_figures(pictures: Mapping[str, bytes], found: Iterable[Sequence[Drawing]], folder: pathlib.Path) -> None:
    """Writes `figures/NAME.png` and `figures/NAME.csv`; figures of an earlier report that are not drawn now go."""
    folder = folder / FIGURES_FOLDER
    with named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for one in (one for drawings in found for one in drawings):
        with named_errors(folder / f'{one.name}.png'):
            (folder / f'{one.name}.png').write_bytes(pictures[one.name])
            (folder / f'{one.name}.csv').write_text(drawing.csv_text(one), encoding='utf-8')
    for old in folder.glob('*.png'):
        with named_errors(old):
            if old.stem not in pictures and drawing.is_own(old.read_bytes()):
                old.with_suffix('.csv').unlink(missing_ok=True)
                old.unlink()
