"""Results of judge files of WildBench as tools of the command line write and print them."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from simrl.evaluation.wildbench import judge_files, official
from simrl.evaluation.wildbench.checklist import Rows
from simrl.evaluation.wildbench.generations import Generation, generator_of
from simrl.evaluation.wildbench.official import RewardSettings, ScoreSettings
from tools.wildbench_tasks import Scope

Result = Mapping[str, Any]


def write_all(
    folder: pathlib.Path,
    found: Mapping[str, Rows],
    generations: Mapping[str, Generation],
    reference: str | None,
    result_of: Callable[[pathlib.Path], Result],
) -> tuple[int, list[tuple[str, pathlib.Path, Result]]]:
    """Writes a judge file of each judge's rows, and prints its result.

    Returns:
        The number of rows without a verdict, and of each judge the file and its result.

    Raises:
        ValueError: a judge has no verdict at all; the files of the others are written.
    """
    lost, without, paths = 0, list[pathlib.Path](), dict[str, pathlib.Path]()
    for judge, rows in found.items():
        path = judge_files.judge_file(folder, judge, generator_of(generations), reference)
        failed = judge_files.write_verdicts(path, rows)
        print(f'{path}: {len(rows) - failed.total()} of {len(rows)} verdicts')
        for cause, count in failed.most_common():
            print(f'no verdict: {count} ({cause})')
        lost += failed.total()
        if failed.total() == len(rows):
            without.append(path)
        else:
            paths[judge] = path
    results = []
    for judge, path in paths.items():
        results.append((judge, path.resolve(), result_of(path)))
        print(f'{path}:')
        print_result(results[-1][-1])
    if without:
        raise ValueError(f'{without[0]}: expected at least one verdict, found none')
    return lost, results


def print_result(result: Result) -> None:
    """Prints a result as JSON."""
    print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)


def score_of(path: pathlib.Path, scope: Scope, settings: ScoreSettings) -> Result:
    scores, left_out = judge_files.read_scores(path, scope.dropped)
    found = official.wb_score(scores, scope.tasks, settings, left_out=left_out, overlap=scope.overlap)
    return dataclasses.asdict(found)


def reward_of(path: pathlib.Path, reference: str, scope: Scope, settings: RewardSettings) -> Result:
    comparisons, left_out = judge_files.read_comparisons(path, reference, scope.dropped)
    bias = official.position(comparisons)
    found = official.wb_reward(comparisons, scope.tasks, settings, left_out=left_out, overlap=scope.overlap)
    return dataclasses.asdict(found) | {'position': None if bias is None else dataclasses.asdict(bias)}


def changed(settings: Any) -> dict[str, str]:
    """The settings that are not the defaults."""
    values = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return {field.name: str(value) for field, value in values if value != field.default}
