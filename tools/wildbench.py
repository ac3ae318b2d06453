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
and `pairs` ask judges for WB-Score and WB-Reward, with prompts of our own, into the benchmark's own judge files, which
`wb-score` and `wb-reward` read by other settings. With --run=RUN the report of that run shows the numbers, too:
--assistants says which of its assistants a model is, where their names differ.

Tasks are those of the hub, or --tasks=FILE in their schema, a JSON object on each line: `session_id`,
`conversation_input` (messages, {role, content}, of which the last is the user's), `checklist` (questions),
`primary_tag` and `secondary_tags` (the benchmark's, such as Planning). Generations are a JSON list of {session_id,
chat_history: [text of each of the task's messages], output: [reply], generator}; a checklist file has on each line what
`checklist` wrote. --training=FILE counts the tasks that training data has, and gives the numbers without them.

After a kill the same command continues: answers are kept in OUTPUT.answers.sqlite, of `score` and `pairs` in
OUTPUT/score.answers.sqlite and OUTPUT/pairs.answers.sqlite. Those of an endpoint are found by model name and request:
another server under the same name is not asked anew. Those of a model on the device are found by its contents; it needs
positions for --prompt_tokens and --max_tokens together. What could not be had is counted, and the exit code is then 1.
The same command asks again for what a server failed, and for no answer that it has, readable or not.
"""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from simrl.conversations.row_files import write_rows
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.wildbench import WildBenchNumber
from simrl.evaluation.wildbench import checklist, judge_files, of_run, verdicts
from simrl.evaluation.wildbench.asking import AskSettings
from simrl.evaluation.wildbench.checklist import Rows
from simrl.evaluation.wildbench.generations import (
    Generation,
    GenerationSettings,
    generate,
    generator_of,
    missing,
    write_generations,
)
from simrl.evaluation.wildbench.official import RewardSettings, ScoreSettings
from simrl.evaluation.wildbench.tasks import SOURCE
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointSettings
from simrl.run.config import local_path
from simrl.run.program import run_program
from simrl.run.stage_files import write_json
from tools.device_replies import add_device_flags, sample_on_device
from tools.intents import add_fields, settings_of
from tools.into_run import add_run_flags, assistant_of, experiment_of, leave_in, reference_of
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
from tools.wildbench_results import Result, changed, print_result, reward_of, score_of, write_all
from tools.wildbench_tasks import Scope, add_task_flags, read_replies, read_scope


def run_generate(options: argparse.Namespace) -> Missing:
    check_output(options.output, '.json')
    settings, endpoint = read_settings(GenerationSettings, vars(options)), settings_of(options, 'endpoint')
    if (endpoint is None) == (options.model is None):
        raise ValueError('expected either --endpoint.url and --endpoint.model, or --model')
    tasks = read_scope(options).known
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
        tasks = asked.scope.known
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
        tasks = asked.scope.known
        found = verdicts.score(tasks, asked.generations, asked.clients, asked.settings, 'scores')

    def result_of(path: pathlib.Path) -> Result:
        return score_of(path, asked.scope, ScoreSettings())

    lost, results = write_all(options.output, found, asked.generations, None, result_of)
    if asked.assistant is not None:
        own = asked.assistant
        leave(options, {str(path): [of_run.of_score(of, own, judge, len(tasks))] for judge, path, of in results})
    return lost, asked_again(options.output / 'score', has_tries=True)


def run_pairs(options: argparse.Namespace) -> Missing:
    with judging(options, options.output / 'pairs') as asked:
        tasks, references = asked.scope.known, read_replies(options.reference, asked.scope)
        found = verdicts.pairs(tasks, asked.generations, references, asked.clients, asked.settings, 'pairs')
    reference = generator_of(references)

    def result_of(path: pathlib.Path) -> Result:
        return reward_of(path, reference, asked.scope, RewardSettings())

    lost, results = write_all(options.output, found, asked.generations, reference, result_of)
    if asked.assistant is not None:
        two = asked.assistant, reference_of(reference, options)
        leave(options, {str(path): [of_run.of_reward(of, *two, judge, len(tasks))] for judge, path, of in results})
    return lost, asked_again(options.output / 'pairs', has_tries=True)


def run_wb_score(options: argparse.Namespace) -> Missing:
    settings = read_settings(ScoreSettings, vars(options))
    return of_judge_file(options, settings, lambda scope: score_of(options.file, scope, settings), of_run.of_score)


def run_wb_reward(options: argparse.Namespace) -> Missing:
    settings = read_settings(RewardSettings, vars(options))

    def number(result: Result, assistant: str, *more: Any) -> WildBenchNumber:
        return of_run.of_reward(result, assistant, reference_of(options.reference, options), *more)

    return of_judge_file(
        options, settings, lambda scope: reward_of(options.file, options.reference, scope, settings), number
    )


def of_judge_file(
    options: argparse.Namespace,
    settings: Any,
    result_of: Callable[[Scope], Result],
    number_of: Callable[[Result, str, str, int, Mapping[str, str]], WildBenchNumber],
) -> Missing:
    """Prints the result of a judge file, and adds it to the run of --run in the place of one of the same file."""
    run, scope = experiment_of(options.into), read_scope(options)
    result, numbers = result_of(scope), dict[str, list[WildBenchNumber]]()
    if run is not None:
        judge, model = judge_files.names_of(options.file)
        own = assistant_of(model, options.into, run, options.assistants)
        number = number_of(result, own, judge, len(scope.known), changed(settings))
        numbers = {str(options.file.resolve()): [number]}
    print_result(result)
    if numbers:
        leave(options, numbers)
    return 0, ''


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Missing], tasks: str | None = SOURCE) -> Any:
        added = commands.add_parser(name)
        added.set_defaults(run=run)
        if name not in ('compare', 'agreement'):
            add_task_flags(added, tasks)
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
    for name, run, settings in (
        ('wb-score', run_wb_score, ScoreSettings()),
        ('wb-reward', run_wb_reward, RewardSettings()),
    ):
        added = command(name, run, None)
        added.add_argument('file', type=local_path)
        if name == 'wb-reward':
            added.add_argument('--reference', required=True, help="the reference's name in the file")
        add_run_flags(added)
        add_settings(added, settings)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(parser_of().parse_args(arguments), 'replies and verdicts of all tasks')


if __name__ == '__main__':
    run_program(main)
