"""WildBench: replies of an assistant to real tasks, and judges' verdicts on them.

    python -m tools.wildbench generate --output=runs/wb/mine.json --endpoint.url=http://127.0.0.1:8000/v1 \\
        --endpoint.model=mine                          or --model=runs/quickstart/persona/seed-0, on the device
    python -m tools.wildbench checklist --generations=runs/wb/mine.json --output=runs/wb/mine.checklist.jsonl \\
        --judge='{"url": "http://127.0.0.1:8001/v1", "model": "judge-a"}' --judge='{"url": ..., "model": "judge-b"}'
    python -m tools.wildbench compare runs/wb/mine.checklist.jsonl runs/wb/initial.checklist.jsonl
    python -m tools.wildbench agreement runs/wb/mine.checklist.jsonl people.jsonl
    python -m tools.wildbench score --generations=runs/wb/mine.json --output=runs/wb/score --judge=...
    python -m tools.wildbench pairs --generations=runs/wb/mine.json --reference=runs/wb/initial.json \\
        --output=runs/wb/pairwise --judge=...
    python -m tools.wildbench wb-score FILE            of a judge file, also of the benchmark's own
    python -m tools.wildbench wb-reward FILE --reference=NAME [--cut_replies='left out' --divisor=all --orders=single]

`generate` writes the benchmark's own result layout. `checklist` is the protocol of arXiv:2605.09808: the share of each
task's checklist that a panel finds satisfied; `compare` is the win rate that follows from two of its files. `agreement`
holds its judges against people: a copy of its file, in which `satisfied` is what people said, or null, gives each
judge's agreement, the correlation of their errors and the number of independent votes that the panel is worth. `score`
and `pairs` ask judges for WB-Score and WB-Reward, with prompts of our own, into the benchmark's own judge files.

Tasks are those of the hub, or --tasks=FILE in their schema, a JSON object on each line: `session_id`,
`conversation_input` (messages, {role, content}, of which the last is the user's), `checklist` (questions),
`primary_tag` and `secondary_tags` (the benchmark's, such as Planning). Generations are a JSON list of {session_id,
output: [reply], generator}; a checklist file has on each line what `checklist` wrote. --training=FILE counts the tasks
that training data has, and gives the numbers without them.

After a kill the same command continues: answers are kept in OUTPUT.answers.sqlite, of `score` and `pairs` in
OUTPUT/score.answers.sqlite and OUTPUT/pairs.answers.sqlite. Those of an endpoint are found by model name and request:
another server under the same name is not asked anew. Those of a model on the device are found by its contents; it needs
positions for --prompt_tokens and --max_tokens together. What could not be had is counted, and the exit code is then 1.
The same command asks again for what a server failed, and for no answer that it has, readable or not.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from simrl.conversations.records import read_conversations, write_rows
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.wildbench import WildBenchNumber
from simrl.evaluation.wildbench import checklist, judge_files, of_run, official, verdicts
from simrl.evaluation.wildbench.asking import AskSettings
from simrl.evaluation.wildbench.checklist import Rows
from simrl.evaluation.wildbench.generations import (
    Generation,
    GenerationSettings,
    generate,
    generator_of,
    missing,
    read_generations,
    write_generations,
)
from simrl.evaluation.wildbench.official import CutReplies, RewardSettings, Weights
from simrl.evaluation.wildbench.tasks import NO_TASK, SOURCE, Overlap, Task, overlap_of, read_tasks
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.run.config import local_path
from simrl.run.program import run_program
from simrl.run.stage_files import write_json
from tools.device_replies import add_device_flags, sample_on_device
from tools.intents import add_fields, settings_of
from tools.into_run import add_run_flags, assistant_of, experiment_of, leave_in
from tools.judges import (
    ON_DEVICE,
    Missing,
    asked_again,
    check_output,
    judges_of,
    opened,
    print_missing,
    run_command,
)
from tools.prepare import add_settings, read_settings

Tasks = Mapping[str, Task]
Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Scope:
    """Tasks that numbers are of.

    Attributes:
        tasks: by id; None: no tags, and nothing is known of those that the file lacks.
        dropped: ids of rows that are no tasks.
        overlap: with training data; None: not measured.
    """

    tasks: dict[str, Task] | None = None
    dropped: frozenset[str] = frozenset()
    overlap: Overlap | None = None


def read_scope(options: argparse.Namespace) -> Scope:
    """The tasks of --tasks, and their overlap with --training; prints how many, and what was changed or dropped.

    Raises:
        ValueError: there is --training alone, or a file of it has no conversation to train on.
    """
    if not options.tasks:
        if options.training:
            raise ValueError('--training: expected --tasks beside it, found none')
        return Scope()
    tasks, counts, dropped = read_tasks(options.tasks, on_bad_rows=options.on_bad_rows, revision=options.revision)
    print(f'{options.tasks}: {len(tasks)} tasks', flush=True)
    for what, count in sorted(counts.items()):
        print(f'  {what}: {count}')
    found = []
    for path in options.training:
        openings = [of.opening for of in read_conversations(path)[0] if of.split == 'train']
        if not openings:
            raise ValueError(f'{path}: expected conversations of the split train, found none')
        print(f'{path}: {len(openings)} conversations of the split train', flush=True)
        found += openings
    overlap = overlap_of(tasks, found) if found else None
    if overlap is not None:
        print(f'tasks that these have: {len(overlap.ids)}', flush=True)
    return Scope(tasks, dropped, overlap)


def known_tasks(scope: Scope) -> dict[str, Task]:
    """The tasks, without which nothing can be asked."""
    if scope.tasks is None:
        raise ValueError('--tasks: expected a hub name, a file or a folder, found none')
    return scope.tasks


def run_generate(options: argparse.Namespace) -> Missing:
    check_output(options.output, '.json')
    settings, endpoint = read_settings(GenerationSettings, vars(options)), settings_of(options, 'endpoint')
    if (endpoint is None) == (options.model is None):
        raise ValueError('expected either --endpoint.url and --endpoint.model, or --model')
    tasks = known_tasks(read_scope(options))
    if endpoint is not None:
        with opened({endpoint.model: endpoint}, options.output) as clients:
            found, failed = generate(tasks, clients[endpoint.model], settings, 'replies')
    else:
        found, failed = sample_on_device(options, settings, tasks)
    if found:
        write_generations(options.output, found, tasks, settings)
    print(f'{options.output}: {"written" if found else "not written"}, {len(found)} of {len(tasks)} replies')
    truncated = sum(bool(of.truncated) for of in found)
    print(f'cut at {settings.max_tokens} tokens: {truncated}')
    print_missing('no reply', failed, missing(tasks, {of.task: of for of in found}))
    return failed.total(), ON_DEVICE if endpoint is None else asked_again(options.output, has_tries=False)


def read_replies(path: pathlib.Path, scope: Scope) -> dict[str, Generation]:
    """The replies of a result file; prints how many tasks have none, and how many replies are to no task."""
    tasks = known_tasks(scope)
    found, left_out = read_generations(path, tasks, scope.dropped)
    more = f'; left out: {left_out} ({NO_TASK})' if left_out else ''
    print(f'{path}: {len(found)} replies; tasks without one: {len(missing(tasks, found))}{more}', flush=True)
    return found


@dataclasses.dataclass(frozen=True)
class Asked:
    """All that judges are asked about.

    Attributes:
        scope: the tasks.
        generations: the replies to judge, by task.
        clients: the judges, whose answers are kept beside the output.
        settings: how they are asked.
        assistant: of --run, whose replies these are; None without a run.
    """

    scope: Scope
    generations: dict[str, Generation]
    clients: dict[str, Endpoint]
    settings: AskSettings
    assistant: str | None


@contextlib.contextmanager
def judging(options: argparse.Namespace, output: pathlib.Path) -> Iterator[Asked]:
    settings, judges = read_settings(AskSettings, vars(options)), judges_of(options)
    run = experiment_of(options.into)
    scope = read_scope(options)
    generations = read_replies(options.generations, scope)
    own = None if run is None else assistant_of(generator_of(generations), options.into, run, options.assistants)
    with opened(judges, output) as clients:
        yield Asked(scope, generations, clients, settings, own)


def leave(options: argparse.Namespace, numbers: Mapping[str, Sequence[WildBenchNumber]]) -> None:
    """Adds numbers to the run of --run; `numbers` by the file that they are of."""
    leave_in(options.into, lambda run: result_files.add_wildbench(numbers, run))


def run_checklist(options: argparse.Namespace) -> Missing:
    check_output(options.output, '.jsonl', '.jsonl.gz')
    with judging(options, options.output) as asked:
        tasks = known_tasks(asked.scope)
        rows = checklist.judge(tasks, asked.generations, asked.clients, asked.settings, 'verdicts')
    write_rows(options.output, rows)
    summary = checklist.summary(rows, tasks, asked.scope.overlap) | {'settings': dataclasses.asdict(asked.settings)}
    write_json(options.output.with_name(options.output.name + '.summary.json'), summary)
    print_result(summary)
    if asked.assistant is not None:
        leave(options, {str(options.output.resolve()): of_run.of_checklist(summary, asked.assistant)})
    return int(summary['tasks']['without a verdict']), asked_again(options.output, has_tries=True)


def run_compare(options: argparse.Namespace) -> Missing:
    run = experiment_of(options.into)
    result = of_both(options.files, checklist.compare)
    names = []
    if run is not None:
        names = [assistant_of(result[of], options.into, run, options.assistants) for of in ('first', 'second')]
    print_result(result)
    if names:
        first, second = (path.resolve() for path in options.files)
        leave(options, {f'{first} over {second}': of_run.of_compare(result, *names)})
    return 0, ''


def run_agreement(options: argparse.Namespace) -> Missing:
    print_result(of_both(options.files, lambda *rows: dataclasses.asdict(checklist.against_people(*rows))))
    return 0, ''


def of_both(paths: Sequence[pathlib.Path], function: Callable[[Rows, Rows], Result]) -> Result:
    """The result that a function makes of the rows of two files; its errors name them."""
    first, second = map(checklist.read_rows, paths)
    try:
        return function(first, second)
    except ValueError as error:
        raise ValueError(f'{paths[0]} and {paths[1]}: {error}') from error


def run_score(options: argparse.Namespace) -> Missing:
    with judging(options, options.output / 'score') as asked:
        tasks = known_tasks(asked.scope)
        found = verdicts.score(tasks, asked.generations, asked.clients, asked.settings, 'scores')
    lost, results = write_all(options.output, found, asked.generations, None, lambda path: score_of(path, asked.scope))
    if asked.assistant is not None:
        own = asked.assistant
        leave(options, {str(path): [of_run.of_score(of, own, judge, len(tasks))] for judge, path, of in results})
    return lost, asked_again(options.output / 'score', has_tries=True)


def run_pairs(options: argparse.Namespace) -> Missing:
    with judging(options, options.output / 'pairs') as asked:
        tasks, references = known_tasks(asked.scope), read_replies(options.reference, asked.scope)
        found = verdicts.pairs(tasks, asked.generations, references, asked.clients, asked.settings, 'pairs')
    reference = generator_of(references)

    def result_of(path: pathlib.Path) -> Result:
        return reward_of(path, reference, asked.scope, RewardSettings())

    lost, results = write_all(options.output, found, asked.generations, reference, result_of)
    if asked.assistant is not None:
        two = asked.assistant, reference
        leave(options, {str(path): [of_run.of_reward(of, *two, judge, len(tasks))] for judge, path, of in results})
    return lost, asked_again(options.output / 'pairs', has_tries=True)


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


def score_of(
    path: pathlib.Path, scope: Scope, cut_replies: CutReplies = 'judged', weights: Weights = 'leaderboard'
) -> Result:
    scores, left_out = judge_files.read_scores(path, scope.dropped)
    quirks: dict[str, Any] = {'cut_replies': cut_replies, 'weights': weights}
    return dataclasses.asdict(
        official.wb_score(scores, scope.tasks, **quirks, left_out=left_out, overlap=scope.overlap)
    )


def reward_of(path: pathlib.Path, reference: str, scope: Scope, settings: RewardSettings) -> Result:
    comparisons, left_out = judge_files.read_comparisons(path, reference, scope.dropped)
    bias = official.position(comparisons)
    found = official.wb_reward(comparisons, scope.tasks, settings, left_out=left_out, overlap=scope.overlap)
    return dataclasses.asdict(found) | {'position': None if bias is None else dataclasses.asdict(bias)}


def run_wb_score(options: argparse.Namespace) -> Missing:
    print_result(score_of(options.file, read_scope(options), options.cut_replies, options.weights))
    return 0, ''


def run_wb_reward(options: argparse.Namespace) -> Missing:
    settings = read_settings(RewardSettings, vars(options))
    print_result(reward_of(options.file, options.reference, read_scope(options), settings))
    return 0, ''


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Missing], tasks: str | None = SOURCE) -> Any:
        added = commands.add_parser(name)
        added.set_defaults(run=run)
        if name not in ('compare', 'agreement'):
            added.add_argument(
                '--tasks', default=tasks, help=f'hub name, file or folder; default: {tasks or "no tags"}'
            )
            added.add_argument('--revision', help='of tasks on the hub; default: the main branch')
            added.add_argument('--on_bad_rows', choices=('raise', 'drop'), default='raise', help='of the tasks')
            told = 'conversations whose split train was trained on; may be repeated'
            added.add_argument('--training', type=local_path, action='append', default=[], help=told)
        return added

    added = command('generate', run_generate)
    added.add_argument('--output', required=True, type=local_path, help='.json')
    add_fields(added, 'endpoint', EndpointSettings)
    added.add_argument('--model', help='a model on the device: OWNER/MODEL, a folder, a .gguf file, or one of a run')
    added.add_argument('--generator', help="the assistant's name in the file; beside --model only; default: the model")
    add_device_flags(added)
    add_settings(added, GenerationSettings())
    for name, run, output in (
        ('checklist', run_checklist, '.jsonl or .jsonl.gz'),
        ('score', run_score, 'folder'),
        ('pairs', run_pairs, 'folder'),
    ):
        added = command(name, run)
        added.add_argument('--generations', required=True, type=local_path, help='result file')
        added.add_argument('--output', required=True, type=local_path, help=output)
        added.add_argument('--judge', required=True, action='append', help='endpoint settings as JSON; may be repeated')
        add_run_flags(added)
        add_settings(added, AskSettings())
        if name == 'pairs':
            added.add_argument('--reference', required=True, type=local_path, help="the reference's result file")
    for name, run in (('compare', run_compare), ('agreement', run_agreement)):
        added = command(name, run)
        added.add_argument(
            'files', nargs=2, type=local_path, help="files of `checklist`; of `agreement` people's second"
        )
        if name == 'compare':
            add_run_flags(added)
    added = command('wb-score', run_wb_score, None)
    added.add_argument('file', type=local_path)
    added.add_argument('--cut_replies', choices=('judged', 'left out'), default='judged', help='in the groups')
    added.add_argument('--weights', choices=('leaderboard', 'equal'), default='leaderboard', help='of groups')
    added = command('wb-reward', run_wb_reward, None)
    added.add_argument('file', type=local_path)
    added.add_argument('--reference', required=True, help="the reference's name in the file")
    add_settings(added, RewardSettings())
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(parser_of().parse_args(arguments), 'replies and verdicts of all tasks')


if __name__ == '__main__':
    run_program(main)
