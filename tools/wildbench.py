"""WildBench: replies of an assistant to real tasks, and judges' verdicts on them.

    python -m tools.wildbench generate --output=runs/wb/mine.json --endpoint.url=http://127.0.0.1:8000/v1 \\
        --endpoint.model=mine                          or --model=runs/quickstart/persona/seed-0, on the device
    python -m tools.wildbench checklist --generations=runs/wb/mine.json --output=runs/wb/mine.checklist.jsonl \\
        --judge='{"url": "http://127.0.0.1:8001/v1", "model": "judge-a"}' --judge='{"url": ..., "model": "judge-b"}'
    python -m tools.wildbench compare runs/wb/mine.checklist.jsonl runs/wb/initial.checklist.jsonl
    python -m tools.wildbench score --generations=runs/wb/mine.json --output=runs/wb/score --judge=...
    python -m tools.wildbench pairs --generations=runs/wb/mine.json --reference=runs/wb/initial.json \\
        --output=runs/wb/pairwise --judge=...
    python -m tools.wildbench wb-score FILE            of a judge file, also of the benchmark's own
    python -m tools.wildbench wb-reward FILE --reference=NAME [--cut_replies='left out' --divisor=all --orders=single]

`generate` writes the benchmark's own result layout. `checklist` is the protocol of arXiv:2605.09808: the share of each
task's checklist that a panel finds satisfied; `compare` is the win rate that follows from two of its files. `score` and
`pairs` ask judges for WB-Score and WB-Reward, with prompts of our own, into the benchmark's own judge files.

Tasks are those of the hub, or --tasks=FILE in their schema. After a kill the same command continues: answers are kept
beside the output (.answers.sqlite). Replies and verdicts that could not be had are counted, and the same command asks
for them again; the exit code is then 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from simrl.conversations.raw_rows import placed_rows
from simrl.conversations.records import read_conversations, write_rows
from simrl.evaluation.wildbench import checklist, judge_files, official, verdicts
from simrl.evaluation.wildbench.asking import AskSettings
from simrl.evaluation.wildbench.generations import (
    Generation,
    GenerationSettings,
    generate,
    missing,
    read_generations,
    sample,
    write_generations,
)
from simrl.evaluation.wildbench.official import CutReplies, RewardSettings
from simrl.evaluation.wildbench.tasks import SOURCE, Task, overlapping, read_tasks
from simrl.experiments.settings import MeshSettings
from simrl.main import USER_ERRORS
from simrl.remote.cache import Cache
from simrl.remote.client import Endpoint, check
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.completion import replies
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import from_config_dict, local_path
from simrl.run.program import run_program
from simrl.run.progress import Progress
from simrl.run.stage_files import write_json
from tools.intents import add_fields, on_device, settings_of
from tools.prepare import add_settings, read_settings

Tasks = Mapping[str, Task]
Rows = Sequence[Mapping[str, Any]]


def read_options_tasks(options: argparse.Namespace) -> dict[str, Task]:
    """The tasks of --tasks; prints what was changed or dropped."""
    tasks, counts = read_tasks(options.tasks, on_bad_rows=options.on_bad_rows, revision=options.revision)
    print(f'{options.tasks}: {len(tasks)} tasks', flush=True)
    for what, count in sorted(counts.items()):
        print(f'  {what}: {count}')
    return tasks


def judges_of(options: argparse.Namespace) -> dict[str, EndpointSettings]:
    """The judges of --judge, by their models' names."""
    found: dict[str, EndpointSettings] = {}
    for text in options.judge:
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f'--judge: expected a JSON object, found {text!r}: {error}') from None
        if not isinstance(fields, dict):
            raise ValueError(f'--judge: expected a JSON object, found {text!r}')
        settings = from_config_dict(EndpointSettings, fields, '--judge')
        if settings.model in found:
            raise ValueError(f'--judge: expected judges of different models, found {settings.model} twice')
        found[settings.model] = settings
    return found


@contextlib.contextmanager
def opened(endpoints: Mapping[str, EndpointSettings], output: pathlib.Path) -> Iterator[dict[str, Endpoint]]:
    """Clients with one cache beside the output; prints their usage at the end."""
    for settings in endpoints.values():
        check(settings)
    with Cache(cache_path(output)) as cache, contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(Endpoint(settings, cache=cache)) for name, settings in endpoints.items()}
        try:
            yield clients
        finally:
            for name, client in clients.items():
                print(f'endpoint {name}: {client.usage()}', flush=True)


def run_generate(options: argparse.Namespace) -> int:
    settings, endpoint = read_settings(GenerationSettings, vars(options)), settings_of(options, 'endpoint')
    if (endpoint is None) == (options.model is None):
        raise ValueError('expected either --endpoint.url and --endpoint.model, or --model')
    tasks = read_options_tasks(options)
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
    for cause, count in failed.most_common():
        print(f'no reply: {count} ({cause})')
    return sum(failed.values())


def sample_on_device(
    options: argparse.Namespace, settings: GenerationSettings, tasks: Tasks
) -> tuple[list[Generation], collections.Counter[str]]:
    """Replies of --model."""
    sampling = Sampling(settings.temperature, top_p=settings.top_p)
    with (
        on_device(options.model, sampling, settings.max_tokens) as (agent, chat),
        Cache(cache_path(options.output)) as cache,
        Progress('replies', len(tasks)) as progress,
    ):
        return sample(
            tasks,
            replies(
                agent,
                chat,
                prompt_tokens=options.prompt_tokens,
                batch_size=options.rows,
                mesh=MeshSettings(data=1).make(),
                seed=options.seed,
            ),
            cache,
            generator=options.generator or options.model,
            identity=f'{options.model} seed={options.seed} {jax.default_backend()} {settings}',
            batch_size=options.rows,
            progress=progress,
        )


def cache_path(output: pathlib.Path) -> pathlib.Path:
    """The file beside the output in which answers are kept."""
    return output.with_name(output.name + '.answers.sqlite')


def read_replies(path: pathlib.Path, tasks: Tasks) -> dict[str, Generation]:
    """The replies of a result file; prints how many tasks have none."""
    found = read_generations(path, tasks)
    print(f'{path}: {len(found)} replies; tasks without one: {len(missing(tasks, found))}', flush=True)
    return found


def read_openings(paths: Sequence[pathlib.Path]) -> list[str]:
    """First user messages of the conversations to train on in files; prints how many there are."""
    found = []
    for path in paths:
        openings = [of.opening for of in read_conversations(path)[0] if of.split == 'train']
        print(f'{path}: {len(openings)} conversations of the split train', flush=True)
        found += openings
    return found


def run_checklist(options: argparse.Namespace) -> int:
    settings, judges = read_settings(AskSettings, vars(options)), judges_of(options)
    if not options.output.name.endswith(('.jsonl', '.jsonl.gz')):  # before anything is paid for
        raise ValueError(f'--output: expected a name that ends in .jsonl or .jsonl.gz, found {options.output.name}')
    tasks = read_options_tasks(options)
    generations = read_replies(options.generations, tasks)
    overlap = overlapping(tasks, read_openings(options.training))
    with opened(judges, options.output) as clients:
        rows = checklist.judge(tasks, generations, clients, settings, 'verdicts')
    write_rows(options.output, rows)
    summary = checklist.summary(rows, tasks, overlap) | {'settings': dataclasses.asdict(settings)}
    write_json(options.output.with_name(options.output.name + '.summary.json'), summary)
    print_result(summary)
    return int(summary['tasks']['without a verdict'])


def run_compare(options: argparse.Namespace) -> int:
    print_result(checklist.compare(*map(read_checklist_rows, options.files)))
    return 0


def read_checklist_rows(path: pathlib.Path) -> list[Mapping[str, Any]]:
    """The rows of a file of `checklist`.

    Raises:
        ValueError: a row is none of its rows, or an id is there twice.
    """
    rows = []
    seen = set[str]()
    for place, row in placed_rows(path):
        match row:
            case {
                'session_id': str(name),
                'task': str(),
                'generator': str(),
                'version': str(),
                'satisfied': list() | None,
                'judges': dict(),
            } if name not in seen:
                seen.add(name)
                rows.append(row)
            case _:
                raise ValueError(
                    f'{place}: expected a row of `checklist` with a session_id of its own, found {str(row)[:80]}'
                )
    if not rows:
        raise ValueError(f'{path}: expected at least one row, found none')
    return rows


def run_score(options: argparse.Namespace) -> int:
    settings, judges = read_settings(AskSettings, vars(options)), judges_of(options)
    tasks = read_options_tasks(options)
    generations = read_replies(options.generations, tasks)
    with opened(judges, options.output / 'score') as clients:
        found = verdicts.score(tasks, generations, clients, settings, 'scores')
    name = f'{file_name(next(iter(generations.values())).generator)}.json'
    rows = {options.output / f'eval={file_name(judge)}' / name: of_judge for judge, of_judge in found.items()}
    lost = write_all(rows)
    for path in rows:
        print_result(score_of(path, tasks))
    return lost


def run_pairs(options: argparse.Namespace) -> int:
    settings, judges = read_settings(AskSettings, vars(options)), judges_of(options)
    tasks = read_options_tasks(options)
    generations = read_replies(options.generations, tasks)
    references = read_replies(options.reference, tasks)
    with opened(judges, options.output / 'pairs') as clients:
        found = verdicts.pairs(tasks, generations, references, clients, settings, 'pairs')
    name, reference = (next(iter(side.values())).generator for side in (generations, references))
    place = pathlib.Path(f'ref={file_name(reference)}', f'{file_name(name)}.json')
    rows = {options.output / f'eval={file_name(judge)}' / place: of_judge for judge, of_judge in found.items()}
    lost = write_all(rows)
    for path in rows:
        print_result(reward_of(path, reference, tasks, RewardSettings()))
    return lost


def file_name(model: str) -> str:
    """The name of a model as a part of a path."""
    return re.sub(r'[^\w.@=-]+', '_', model)


def write_all(rows_by_path: Mapping[pathlib.Path, Rows]) -> int:
    """Writes judge files; returns the number of rows without a verdict, and prints them by cause.

    Raises:
        ValueError: a judge has no verdict at all; the files of the others are written.
    """
    lost, without = 0, []
    for path, rows in rows_by_path.items():
        failed = judge_files.write_verdicts(path, rows)
        print(f'{path}: {len(rows) - failed.total()} of {len(rows)} verdicts')
        for cause, count in failed.most_common():
            print(f'no verdict: {count} ({cause})')
        lost += failed.total()
        without += [path] if failed.total() == len(rows) else []
    if without:
        raise ValueError(f'{without[0]}: expected at least one verdict, found none')
    return lost


def print_result(result: Mapping[str, Any]) -> None:
    """Prints a result as JSON."""
    print(json.dumps(result, indent=1, ensure_ascii=False), flush=True)


def score_of(path: pathlib.Path, tasks: Tasks | None, cut_replies: CutReplies = 'judged') -> Mapping[str, Any]:
    scores, left_out = judge_files.read_scores(path)
    return dataclasses.asdict(official.wb_score(scores, tasks, cut_replies=cut_replies, left_out=left_out))


def reward_of(path: pathlib.Path, reference: str, tasks: Tasks | None, settings: RewardSettings) -> Mapping[str, Any]:
    comparisons, left_out = judge_files.read_comparisons(path, reference)
    bias = official.position(comparisons)
    return dataclasses.asdict(official.wb_reward(comparisons, tasks, settings, left_out=left_out)) | {
        'position': None if bias is None else dataclasses.asdict(bias)
    }


def run_wb_score(options: argparse.Namespace) -> int:
    tasks = read_options_tasks(options) if options.tasks else None
    print_result(score_of(options.file, tasks, cut_replies=options.cut_replies))
    return 0


def run_wb_reward(options: argparse.Namespace) -> int:
    settings = read_settings(RewardSettings, vars(options))
    tasks = read_options_tasks(options) if options.tasks else None
    print_result(reward_of(options.file, options.reference, tasks, settings))
    return 0


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], tasks: str | None = SOURCE) -> Any:
        added = commands.add_parser(name)
        added.set_defaults(run=run)
        if name != 'compare':
            added.add_argument(
                '--tasks', default=tasks, help=f'hub name, file or folder; default: {tasks or "no tags"}'
            )
            added.add_argument('--revision', help='of tasks on the hub; default: the main branch')
            added.add_argument('--on_bad_rows', choices=('raise', 'drop'), default='raise', help='of the tasks')
        return added

    added = command('generate', run_generate)
    added.add_argument('--output', required=True, type=local_path, help='.json')
    add_fields(added, 'endpoint', EndpointSettings)
    added.add_argument('--model', help='a model on the device: OWNER/MODEL, a folder, a .gguf file, or one of a run')
    added.add_argument('--generator', help="the assistant's name in the file; beside --model only; default: the model")
    added.add_argument('--prompt_tokens', type=int, default=4096, help='max tokens of a task; beside --model only')
    added.add_argument('--rows', type=int, default=16, help='replies sampled at once; beside --model only')
    added.add_argument('--seed', type=int, default=0, help='of sampling; beside --model only')
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
        add_settings(added, AskSettings())
        if name == 'checklist':
            told = 'conversations whose split train was trained on; may be repeated'
            added.add_argument('--training', type=local_path, action='append', default=[], help=told)
        if name == 'pairs':
            added.add_argument('--reference', required=True, type=local_path, help="the reference's result file")
    added = command('compare', run_compare)
    added.add_argument('files', nargs=2, type=local_path, help='files of `checklist`')
    added = command('wb-score', run_wb_score, None)
    added.add_argument('file', type=local_path)
    added.add_argument('--cut_replies', choices=('judged', 'left out'), default='judged', help='in the groups')
    added = command('wb-reward', run_wb_reward, None)
    added.add_argument('file', type=local_path)
    added.add_argument('--reference', required=True, help="the reference's name in the file")
    add_settings(added, RewardSettings())
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser_of().parse_args(arguments)
    try:
        lost = options.run(options)
    except (*USER_ERRORS, ValueError) as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        print('stopped; the same command continues', file=sys.stderr)
        sys.exit(130)
    if lost:
        sys.exit(
            f'error: expected replies and verdicts of all tasks, found {lost} missing; the same command asks again'
        )


if __name__ == '__main__':
    run_program(main)
