"""The files in `results/`, and how they are written and read back.

The experiment makes the dataclasses, `write` stores each as a JSON file, the report takes them as they are. `read` is
for tools that open a finished run. What tools add to it (`Added`), `write` leaves as it is.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from simrl.evaluation.results.conversations import ConversationsResult
from simrl.evaluation.results.judges import JudgedComparison, JudgesResult
from simrl.evaluation.results.measures import ExperimentResult, MeasureResult, ScoresResult
from simrl.evaluation.results.simulators import FidelityResult, ForecastResult, MatrixResult
from simrl.evaluation.results.study import StudyResult
from simrl.evaluation.results.training import TimingsResult, TrainingResult
from simrl.evaluation.results.wildbench import WildBenchNumber, WildBenchResult
from simrl.run import config as config_lib
from simrl.run.stage_files import write_json

T = TypeVar('T')

RESULTS_FOLDER = 'results'


@dataclasses.dataclass(frozen=True)
class Results:
    """All of a finished run; a field is a file of its name, `measures` are one file each."""

    experiment: ExperimentResult
    measures: dict[str, MeasureResult]
    scores: ScoresResult
    matrix: MatrixResult | None  # None where assistants do not meet simulators
    fidelity: FidelityResult
    training: TrainingResult
    conversations: ConversationsResult
    timings: TimingsResult
    forecast: ForecastResult | None = None  # None where nothing was forecast, and in results of an earlier version


@dataclasses.dataclass(frozen=True)
class Added:
    """Results that tools have added to a finished run; a field is a file of its name, None where there is none."""

    study: StudyResult | None = None
    judges: JudgesResult | None = None
    wildbench: WildBenchResult | None = None


FILES: dict[str, type] = {
    'experiment': ExperimentResult,
    'scores': ScoresResult,
    'matrix': MatrixResult,
    'fidelity': FidelityResult,
    'training': TrainingResult,
    'conversations': ConversationsResult,
    'timings': TimingsResult,
    'forecast': ForecastResult,
}
OPTIONAL = ('matrix', 'forecast')  # null where there is none
ADDED: dict[str, type] = {'study': StudyResult, 'judges': JudgesResult, 'wildbench': WildBenchResult}


def write(results: Results, workdir: pathlib.Path) -> None:
    """Stores each part of the results as `results/NAME.json`."""
    (workdir / RESULTS_FOLDER).mkdir(exist_ok=True)
    for name, part in {**{name: getattr(results, name) for name in FILES}, **results.measures}.items():
        _write(part, workdir, name)


def read(workdir: pathlib.Path) -> Results:
    """The results of a finished run.

    Raises:
        ConfigError: there are none, or a file is not JSON or not of this version; names the file and the field.
    """
    parts: dict[str, Any] = {name: _read(cls, workdir, name) for name, cls in FILES.items() if name not in OPTIONAL}
    measures = {name: _read(MeasureResult, workdir, name) for name in parts['experiment'].measures}
    parts['matrix'] = None if _content(workdir, 'matrix') is None else _read(MatrixResult, workdir, 'matrix')
    forecast = _path(workdir, 'forecast').exists() and _content(workdir, 'forecast') is not None
    return Results(
        measures=measures, forecast=_read(ForecastResult, workdir, 'forecast') if forecast else None, **parts
    )


def read_added(workdir: pathlib.Path) -> Added:
    """Reads the results that tools have added to a run.

    Raises:
        ConfigError: as of `read`.
    """
    return Added(**{name: _read(cls, workdir, name) for name, cls in ADDED.items() if _path(workdir, name).exists()})


def add_study(found: StudyResult, workdir: pathlib.Path) -> None:
    """Adds the result of a study, in the place of an earlier one."""
    _write(found, workdir, 'study')


def add_judges(folder: pathlib.Path, found: JudgedComparison, workdir: pathlib.Path) -> None:
    """Adds a comparison by judges beside others; `folder` has its verdicts, and is what it is known by.

    Raises:
        ConfigError: the file that is there is broken.
    """
    others = read_added(workdir).judges
    kept = {} if others is None else others.comparisons
    _write(JudgesResult({**kept, str(folder.resolve()): found}), workdir, 'judges')


def add_wildbench(found: Mapping[str, Sequence[WildBenchNumber]], workdir: pathlib.Path) -> None:
    """The same of numbers on WildBench; `found` by the file of their verdicts."""
    others = read_added(workdir).wildbench
    kept = {} if others is None else others.outputs
    _write(WildBenchResult(kept | {name: tuple(numbers) for name, numbers in found.items()}), workdir, 'wildbench')


def _write(found: Any, workdir: pathlib.Path, name: str) -> None:
    write_json(_path(workdir, name), config_lib.to_dict(found))


def _read(cls: type[T], workdir: pathlib.Path, name: str) -> T:
    return config_lib.from_config_dict(cls, _content(workdir, name), str(_path(workdir, name)))


def _content(workdir: pathlib.Path, name: str) -> Any:
    path = _path(workdir, name)
    if not path.exists():
        raise config_lib.ConfigError(f'{path}: expected the results of a finished run, found no such file')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise config_lib.ConfigError(f'{path}: expected JSON, found an error: {error}') from error


def _path(workdir: pathlib.Path, name: str) -> pathlib.Path:
    return workdir / RESULTS_FOLDER / f'{name}.json'
