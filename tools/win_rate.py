"""Pairwise win rates: judges see the responses of two assistants in both orders, and say which served the user better.

    python -m tools.win_rate judge trained=runs/trained.jsonl initial=runs/initial.jsonl --output=runs/win_rate \\
        --judge='{"url": "http://127.0.0.1:8000/v1", "model": "judge-a"}' --judge='{"url": ..., "model": "judge-b"}'
    python -m tools.win_rate respond --assistant=runs/quickstart/persona/seed-0 --user=oracle --people=100 \\
        --output=runs/trained.jsonl                        or --prompts=FILE in the place of --user and --people

`judge` takes two or more assistants as NAME=FILE, of rows `{id, messages: [{role, content}], person?, intent?}` or in
WildBench's result layout; or a stage of a run, such as runs/quickstart/people/initial/block-0, which keeps no more
conversations than the report shows. All assistants were given the same: the opening, or with --given=history all
messages before the last reply. Judges are endpoints (--judge), a model on the device (--model), or both.

`respond` has an assistant reply to prompts, rows as above that end with the user's message, or talk with the held-out
people of its run, played by one of the run's simulators: each assistant of a run meets the same. To prompts an endpoint
may reply, too (--endpoint.url and --endpoint.model in the place of --assistant).

OUTPUT gets verdicts.jsonl (each verdict with its order and raw text) and results.json. A preference is the mean of both
orders; with --combine=strict a flip is a tie. With --run=RUN, of whose assistants the names are ('initial',
'persona/seed-0'), the report of that run shows the result, too. After a kill the same command continues: answers are
kept in OUTPUT/judge.answers.sqlite, those of `respond` in OUTPUT.answers.sqlite, by model name and request: another
server under the same name is not asked anew. Verdicts that could not be had are counted and bounded, and those that a
server failed are asked for again; the exit code is then 1.

A model on the device needs positions for --prompt_tokens and --max_tokens together; an error names values that fit.
"""

import argparse
import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from simrl.conversations.records import Conversation, parse_conversation
from simrl.conversations.row_files import RowError, placed_rows, write_rows
from simrl.evaluation.pairwise import judges, responses
from simrl.evaluation.pairwise.judges import Judged, Verdict
from simrl.evaluation.pairwise.of_run import assistants_of_run, comparison_of
from simrl.evaluation.pairwise.responses import Response
from simrl.evaluation.pairwise.table import Labels, Table, table
from simrl.evaluation.pairwise.text import console_table
from simrl.evaluation.results import files as result_files
from simrl.evaluation.results.judges import PANEL
from simrl.evaluation.wildbench.asking import AskSettings
from simrl.evaluation.wildbench.generations import GenerationSettings, generate, missing
from simrl.evaluation.wildbench.tasks import Task
from simrl.remote.cache import Cache
from simrl.remote.settings import EndpointSettings
from simrl.run import config
from simrl.run.config import local_path
from simrl.run.program import run_program
from simrl.run.stage_files import write_json
from simrl.serving import respond
from tools.device_judge import of_model, open_judge
from tools.device_replies import add_device_flags, device, sample_on_device
from tools.intents import add_fields, settings_of
from tools.into_run import add_run_flag, experiment_of, leave_in
from tools.judges import (
    ON_DEVICE,
    Missing,
    asked_again,
    cache_path,
    check_output,
    judges_of,
    one_line,
    opened,
    print_missing,
    run_command,
)
from tools.prepare import add_settings, read_settings

VERDICTS_FILE, RESULTS_FILE = 'verdicts.jsonl', 'results.json'
ESTIMAND = (
    'the mean over people, or openings where people are not known, of the mean preference for the first assistant with '
    'each, ties one half; intervals over them are of these responses only'
)


def read_assistants(options: argparse.Namespace) -> dict[str, dict[str, Response]]:
    """The responses of NAME=FILE, by name; prints how many there are."""
    found: dict[str, dict[str, Response]] = {}
    for text in options.responses:
        name, separator, path = text.partition('=')
        if not (name and separator and path):
            raise ValueError(f'expected NAME=FILE, found {text!r}')
        if name in found:
            raise ValueError(f'{text}: expected assistants of different names, found {name!r} twice')
        found[name], counts = responses.read_responses(local_path(path), options.given)
        print(f'{name}: {len(found[name])} responses of {path}')
        for what, count in counts.items():
            print(f'  {what}: {count}')
    return found


def read_labels(path: pathlib.Path, pairs: Sequence[responses.Pair]) -> Labels:
    """People's preferences, of rows `{id, first, second, preference}`.

    Raises:
        ValueError: a row is none of these, or of no pair, or a pair is there twice; it names the row.
    """
    known = {(pair.id, pair.first, pair.second) for pair in pairs}
    labels: dict[tuple[str, str, str], float] = {}
    for place, row in placed_rows(path):
        match row:
            case {'id': str(name), 'first': str(a), 'second': str(b), 'preference': int() | float() as value} if (
                0 <= value <= 1
            ):
                key, value = ((name, a, b), value) if (name, a, b) in known else ((name, b, a), 1 - value)
            case _:
                raise ValueError(
                    f'{place}: expected id, first, second, and a preference for the first from 0 to 1, found '
                    f'{str(row)[:80]}'
                )
        if key not in known or key in labels:
            found = 'it again' if key in labels else f'another pair, {name!r} of {a!r} and {b!r}'
            raise ValueError(f'{place}: expected a pair that is judged, found {found}')
        labels[key] = float(value)
    return labels


def run_judge(options: argparse.Namespace) -> Missing:
    settings, endpoints = read_settings(AskSettings, vars(options)), judges_of(options)
    names = [*endpoints, *([] if options.model is None else [options.model])]
    if not names:
        raise ValueError('expected at least one judge, --judge or --model, found none')
    if PANEL in names or len(set(names)) < len(names):
        raise ValueError(f'expected judges of different names, and none {PANEL!r}, found {", ".join(names)}')
    run = experiment_of(options.into)
    read = read_assistants(options)
    found: Mapping[str, responses.Responses] = read if run is None else assistants_of_run(read, run)
    pairs = responses.compared(found, against=options.against, on_missing=options.on_missing)
    labels = None if options.labels is None else read_labels(options.labels, pairs)
    model = None if options.model is None else open_judge(options)  # before anything is paid for
    print(f'{len(pairs)} pairs in both orders, {len(names)} judges', flush=True)
    output = options.output / 'judge'

    def ask(asked: Sequence[tuple[Response, Response]]) -> dict[str, list[Verdict]]:
        with opened(endpoints, output) as clients:
            verdicts = judges.by_endpoints(asked, clients, settings, 'verdicts') if clients else {}
        if model is not None:
            verdicts[options.model] = of_model(options, model, settings, asked)
        return verdicts

    judged = judges.judge(found, pairs, ask)
    write_rows(options.output / VERDICTS_FILE, [one.row() for one in judged])
    result = table(judged, found, combine=options.combine, labels=labels)
    write_json(options.output / RESULTS_FILE, plain(result, options, names))
    print(console_table(result))
    if options.into is not None:
        comparison = comparison_of(result, names, pairs)
        leave_in(options.into, lambda run: result_files.add_judges(options.output, comparison, run))
    helps = [asked_again(output, has_tries=True)] if endpoints else []
    helps += [] if model is None else ['what is too long for --model may fit into more --lengths']
    return print_lost(judged, options.output), '; '.join(helps)


def print_lost(judged: Sequence[Judged], output: pathlib.Path) -> int:
    """Prints what has no verdict by cause, with the first one; returns how many a judge was asked for."""
    lost, first = judges.causes(judged), dict[str, Judged]()
    for of in judged:
        first.setdefault(of.verdict.cause, of)
    for cause, count in sorted(lost.items()):
        of = first[cause]
        detail = f': {one_line(of.verdict.detail)}' if of.verdict.detail else ''
        print(f'no verdict: {count} ({cause}), the first by {of.judge} on {of.pair.id!r}{detail}')
    print(f'{output / VERDICTS_FILE}: {len(judged) - lost.total()} of {len(judged)} verdicts')
    return lost.total() - lost[judges.NO_RESPONSE]


def plain(result: Table, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The table as JSON, with what decided it."""
    told = {
        'estimand': ESTIMAND,
        'judges': names,
        'prompt': judges.VERSION,
        'assistants': list(options.responses),
        'given': options.given,
        'labels': options.labels,
        'settings': read_settings(AskSettings, vars(options)),
        'read': options.read if options.model is not None else None,
    }
    rankings = {
        source: ranking if isinstance(ranking, str) else vars(ranking) | {'differences': named(ranking.differences)}
        for source, ranking in result.rankings.items()
    }
    whole: dict[str, Any] = config.to_dict(told | vars(result) | {'rankings': rankings})
    return whole


def named(by_two: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    return {' over '.join(two): value for two, value in by_two.items()}


def run_respond(options: argparse.Namespace) -> Missing:
    check_output(options.output, '.jsonl', '.jsonl.gz', '.parquet')
    endpoint = settings_of(options, 'endpoint')
    if (options.prompts is None) == (options.user is None):
        raise ValueError('expected either --prompts or --user')
    if (endpoint is None) == (options.model is None):
        raise ValueError('expected either --endpoint.url and --endpoint.model, or --assistant')
    if options.user is not None:
        if options.model is None:
            raise ValueError('--user: expected --assistant, found an endpoint')
        with device(), Cache(cache_path(options.output)) as cache:
            rows, failed = respond.with_user(options.model, options.user, cache, people=options.people)
        without, helps = list[str](), 'the same command tries the conversations that failed again'
    else:
        rows, failed, without = reply(options, endpoint)
        helps = ON_DEVICE if endpoint is None else asked_again(options.output, has_tries=False)
    if rows:
        write_rows(options.output, rows)
    print(f'{options.output}: {"written" if rows else "not written"}, {len(rows)} of {len(rows) + failed.total()}')
    print_missing('no response', failed, without)
    return failed.total(), helps


def reply(
    options: argparse.Namespace, endpoint: EndpointSettings | None
) -> tuple[list[dict[str, Any]], collections.Counter[str], list[str]]:
    """Rows of the assistant's replies to --prompts; the number of prompts without one by cause, and their ids."""
    settings = read_settings(GenerationSettings, vars(options))
    prompts = read_prompts(options.prompts)
    tasks = {name: Task(conversation, (), '', ()) for name, (conversation, _) in prompts.items()}
    if endpoint is None:
        found, failed = sample_on_device(options, settings, tasks)
    else:
        with opened({endpoint.model: endpoint}, options.output) as clients:
            found, failed = generate(tasks, clients[endpoint.model], settings, 'replies')
    rows = []
    for of in found:
        said = {'role': 'assistant', 'content': of.text, 'truncated': of.truncated}
        row = prompts[of.task][1]
        rows.append({**row, 'messages': [*row['messages'], said]})
    return rows, failed, missing(tasks, {of.task: of for of in found})


def read_prompts(path: pathlib.Path) -> dict[str, tuple[Conversation, dict[str, Any]]]:
    """The prompts of a file by id, with their rows.

    Raises:
        RowError: a row has no messages that end with the user's, or an id is there twice; it names the row.
        ValueError: there is none.
    """
    prompts: dict[str, tuple[Conversation, dict[str, Any]]] = {}
    for place, row in placed_rows(path, responses.FIELDS):
        own = {field: row[field] for field in responses.FIELDS if row.get(field) is not None}
        try:
            conversation, _ = parse_conversation({'source': 'prompts', 'split': 'test', **own})
            if (last := conversation.messages[-1].role) != 'user':
                raise RowError('no question', f"messages: expected them to end with the user's, found the {last}'s")
            if conversation.id in prompts:
                raise RowError('duplicate id', f'id: expected another in each row, found {conversation.id!r} again')
        except RowError as error:
            raise RowError(error.reason, error.detail, f'{place}: ') from None
        prompts[conversation.id] = conversation, own
    if not prompts:
        raise ValueError(f'{path}: expected at least one prompt, found none')
    return prompts


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    added = commands.add_parser('judge')
    added.set_defaults(run=run_judge)
    added.add_argument('responses', nargs='+', metavar='NAME=FILE', help='an assistant, and its responses')
    added.add_argument('--output', required=True, type=local_path, help='folder')
    added.add_argument('--judge', action='append', default=[], help='endpoint settings as JSON; may be repeated')
    added.add_argument('--model', help='a judge on the device: OWNER/MODEL, a folder or a .gguf file')
    added.add_argument('--read', choices=('argmax', 'expected'), default='argmax', help='of --model: its verdict')
    added.add_argument('--lengths', type=int, nargs='+', default=[1024, 2048, 4096], help='of --model: tokens')
    added.add_argument('--rows', type=int, default=8, help='of --model: pairs judged at once')
    added.add_argument('--date', default='26 Jul 2024', help='of --model: today, for a template that writes it')
    added.add_argument('--combine', choices=('mean', 'strict'), default='mean', help='of both orders')
    added.add_argument('--given', choices=('opening', 'history', 'nothing'), default='opening', help='of rows')
    added.add_argument('--against', help='compare all others with this assistant; default: each two')
    added.add_argument('--on_missing', choices=('raise', 'failure'), default='raise', help='of ids that some lack')
    added.add_argument('--labels', type=local_path, help="people's preferences: id, first, second, preference")
    add_settings(added, AskSettings())
    add_run_flag(added)
    added = commands.add_parser('respond')
    added.set_defaults(run=run_respond)
    known = 'RUN/initial, RUN/ARM/seed-K; for --prompts also OWNER/MODEL, a folder or a .gguf file'
    added.add_argument('--assistant', dest='model', metavar='ASSISTANT', help=known)
    add_fields(added, 'endpoint', EndpointSettings)
    added.add_argument('--output', required=True, type=local_path, help='.jsonl, .jsonl.gz or .parquet')
    added.add_argument('--prompts', type=local_path, help='rows {id, messages} that end with the user')
    added.add_argument('--user', help='a simulator of the run, or an arm whose simulator is people')
    added.add_argument('--people', type=int, default=100, help='held-out people; beside --user')
    add_device_flags(added, 'on the device only')
    added.set_defaults(generator=None)
    add_settings(added, GenerationSettings())
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(parser_of().parse_args(arguments), 'all responses and verdicts')


if __name__ == '__main__':
    run_program(main)
