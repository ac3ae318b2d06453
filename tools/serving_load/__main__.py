"""Measures OpenAI-compatible servers under load, beside each other and beside simrl's own sampler.

    python -m tools.serving_load http://127.0.0.1:8000/v1 --streams 1 64
    python -m tools.serving_load simrl=http://127.0.0.1:8000/v1 other=http://127.0.0.1:9000/v1 --model NAME OTHER \\
        --cases streams chats chats-fresh --data=conversations.jsonl.gz --offline=SmolLM2-135M-Instruct.gguf
    python -m tools.serving_load http://127.0.0.1:8000/v1 --cases=soak --requests=2000 --pid=PID

`streams` sends single messages, so many at once (`--streams`). `chats` holds chats of several turns (`--turns`), each
sent with the whole history, under a system text of its own; in `chats-fresh` the system text changes with each turn, so
that no server can use again what it computed for the turn before. `soak` sends many messages at the largest number of
streams and watches the memory of the process `--pid`.

Users' messages are those of `--data`, a file of conversations, else made up. Each is sent once to each server, as far
as they suffice. Sides take turns, A B A B, after a round that is not measured. `--offline` is simrl's own sampler with
the model of that name, in a process of its own, on the prompts of `streams`, in batches of as many rows as streams.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence

from simrl.conversations.records import read_conversations
from simrl.experiments.sources import print_counts
from simrl.main import USER_ERRORS
from simrl.remote.client import with_model
from simrl.remote.settings import EndpointSettings
from simrl.rollouts.token_sampling import Sampling
from simrl.run.config import local_path
from simrl.run.program import run_program
from tools.benchmark.protocol import Side, SideError, resident_bytes
from tools.judges import one_line
from tools.serving_load import offline
from tools.serving_load.drive import Chat, Load, run
from tools.serving_load.report import Memory, Row, table, to_json

CASES = ('streams', 'chats', 'chats-fresh', 'soak')
OFFLINE = 'offline'
SOAK_REQUESTS, LEAST_REQUESTS = 2000, 8
SEEDS = 1000  # of a chat, more than it has turns
WORDS = (
    'how could the old garden near a river grow better beans when rain never stops and my neighbour says no to seeds'
)


def made_up(turns: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Messages of 3 to 60 words, by seed."""
    draw = random.Random(seed)
    while True:
        yield tuple(' '.join(draw.choices(WORDS.split(), k=draw.randint(3, 60))) for _ in range(turns))


def of_people(path: pathlib.Path, turns: int, most: int) -> Iterator[tuple[str, ...]]:
    """The first `turns` messages of the users of a file's conversations, again from the first at the end.

    Those with fewer messages, or with one of more than `most` characters, are left out, and what another began with.

    Raises:
        RowError, OSError: as of `read_conversations`.
        ValueError: nothing is left.
    """
    conversations, counts = read_conversations(path, on_bad_rows='drop')
    texts = [tuple(m.content for m in c.spoken if m.role == 'user')[:turns] for c in conversations]
    fitting = [x for x in texts if len(x) == turns and max(map(len, x)) <= most]
    kept = list({x[0]: x for x in fitting}.values())
    counts[f'fewer than {turns} turns, or one over {most} characters'] += len(texts) - len(fitting)
    counts['the same first message'] += len(fitting) - len(kept)
    print_counts(f'{path}, {turns} turns', len(kept), counts)
    if not kept:
        raise ValueError(f'{path}: expected conversations of {turns} turns up to {most} characters, found none')
    for number in itertools.count(1):
        yield from kept
        print(f'all {len(kept)} were sent: they are sent again ({number})', flush=True)


def chats_of(texts: Iterator[tuple[str, ...]], numbers: range, case: str, seed: int) -> list[Chat]:
    """The next chats of a case, by their numbers; of messages alone without a system text."""
    found = []
    for number, own in zip(numbers, texts, strict=False):
        systems: tuple[str | None, ...] = (None,) * len(own)
        if case in ('chats', 'chats-fresh'):  # texts of equal length, which differ from the start
            turns = range(len(own)) if case == 'chats-fresh' else [0] * len(own)
            systems = tuple(f'{number:06}.{turn:02} is the number of this chat.' for turn in turns)
        found.append(Chat(own, systems, seed + SEEDS * number))
    return found


def with_names(servers: Sequence[str], options: argparse.Namespace) -> dict[str, EndpointSettings]:
    """The endpoints by name, each with a model that it has.

    Raises:
        ValueError: a name twice, or another number of models.
        EndpointError: one does not answer, or has not the model.
    """
    models = options.model or [None]
    if len(models) not in (1, len(servers)):
        raise ValueError(f'--model: expected one, or one for each of {len(servers)} servers, found {len(models)}')
    found: dict[str, EndpointSettings] = {}
    for server, model in zip(servers, models * (1 if len(models) > 1 else len(servers)), strict=True):
        before, equals, after = server.partition('=')
        name, url = (before, after) if equals and '/' not in before else (server, server)
        if name in found or name == OFFLINE:
            raise ValueError(f'{server}: expected another name than those before, and than {OFFLINE}, found {name}')
        settings = EndpointSettings(
            url, 'any', key_variable=options.key_variable, extra=options.extra, try_seconds=options.seconds
        )
        found[name] = with_model(settings, model)
    return found


class Measurement:
    """The sides, and what they are sent."""

    def __init__(self, servers: dict[str, EndpointSettings], child: Side | None, options: argparse.Namespace) -> None:
        self.servers, self.child, self.options = servers, child, options
        self.sampling = Sampling(options.temperature, top_p=options.top_p)
        self.texts: dict[int, Iterator[tuple[str, ...]]] = {}
        self.sent = 0  # chats so far

    def next_chats(self, case: str, number: int) -> list[Chat]:
        options, turns = self.options, self.options.turns if case.startswith('chats') else 1
        if turns not in self.texts:
            data = options.data
            found = made_up(turns, options.seed) if data is None else of_people(data, turns, options.prompt_chars)
            self.texts[turns] = found
        numbers = range(self.sent, self.sent + number)
        self.sent += number
        return chats_of(self.texts[turns], numbers, case, options.seed)

    def serve(self, name: str, chats: Sequence[Chat], streams: int, pid: int | None = None) -> tuple[Load, list[int]]:
        settings = dataclasses.replace(self.servers[name], in_flight=streams)
        return run(settings, chats, max_tokens=self.options.max_tokens, sampling=self.sampling, pid=pid)

    def rows(self, case: str, streams: int) -> list[Row]:
        """A case with so many streams, on all sides."""
        number = self.options.requests or max(2 * streams, LEAST_REQUESTS)
        for name in self.servers:
            self.serve(name, self.next_chats(case, streams), streams)
        loads: dict[str, list[Load]] = {name: [] for name in self.servers}
        for _ in range(self.options.repeats):
            chats = self.next_chats(case, number)
            for name in self.servers:
                loads[name].append(self.serve(name, chats, streams)[0])
            if self.child is not None and case == 'streams':
                loads.setdefault(OFFLINE, []).append(self.offline(chats, streams))
        return [Row(case, streams, name, tuple(found)) for name, found in loads.items()]

    def offline(self, chats: Sequence[Chat], streams: int) -> Load:
        assert self.child is not None
        reply = self.child.request('run', texts=[chat.texts[0] for chat in chats], streams=streams)
        return Load(reply['sampling_seconds'], 0.0, len(chats), reply['tokens'], {})

    def soak(self, name: str, pid: int | None) -> tuple[Row, Memory | None]:
        """Many messages at the largest number of streams, and the memory of the server's process meanwhile."""
        streams = max(self.options.streams)
        before = 0 if pid is None else resident_bytes(process=pid)
        chats = self.next_chats('soak', self.options.requests or SOAK_REQUESTS)
        load, sizes = self.serve(name, chats, streams, pid)
        row = Row('soak', streams, name, (load,))
        return row, None if pid is None else Memory(before, tuple(sizes), resident_bytes(process=pid))


def measure(options: argparse.Namespace) -> None:
    if options.pid and len(options.pid) != len(options.servers):
        raise ValueError(f'--pid: expected one for each of {len(options.servers)} servers, found {len(options.pid)}')
    for pid in options.pid:
        resident_bytes(process=pid)
    servers = with_names(options.servers, options)
    rows: list[Row] = []
    memory: dict[str, Memory] = {}
    with contextlib.ExitStack() as stack:
        child = None
        if options.offline is not None:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            sampling = Sampling(options.temperature, top_p=options.top_p)
            child = offline.start(
                options.offline, folder, max_tokens=options.max_tokens, sampling=sampling, seed=options.seed
            )
            stack.enter_context(child).load()
        measurement = Measurement(servers, child, options)
        for case in options.cases:
            found: list[Row] = []
            if case == 'soak':
                for name, pid in itertools.zip_longest(servers, options.pid):
                    row, size = measurement.soak(name, pid)
                    found.append(row)
                    if size is not None:
                        memory[name] = size
            else:
                for streams in options.streams:
                    found += measurement.rows(case, streams)
            for row in found:
                print(f'{row.case} x {row.streams}, {row.side}: {row.rate:,.1f} tokens/s', flush=True)
                for cause, detail in row.details.items():
                    print(f'  first failure ({cause}): {one_line(detail)}', flush=True)
            rows += found
    print(f'\n{table(rows)}')
    for name, size in memory.items():
        print(f'{name}, {size}')
    content = {
        'options': vars(options),
        'rows': [to_json(row, rows) for row in rows],
        'memory': {name: dataclasses.asdict(size) | {'is_flat': size.is_flat} for name, size in memory.items()},
    }
    options.output.write_text(json.dumps(content, indent=1, default=str) + '\n', encoding='utf-8')
    print(f'{options.output}: written')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('servers', nargs='+', metavar='[NAME=]URL')
    parser.add_argument('--model', nargs='+', help='names on the servers; default: the only one of each')
    parser.add_argument('--key-variable', help='environment variable with the key of the servers; default: no key')
    parser.add_argument('--extra', default='', help='a JSON object that is merged into every request')
    parser.add_argument('--cases', nargs='+', default=['streams'], choices=CASES)
    parser.add_argument('--streams', nargs='+', type=int, default=[1, 64], help='requests in flight')
    parser.add_argument(
        '--requests',
        type=int,
        help=f'chats for a measurement; default: two for a stream, at least {LEAST_REQUESTS}; of soak {SOAK_REQUESTS}',
    )
    parser.add_argument('--repeats', type=int, default=2, help='measurements of each side, in turn')
    parser.add_argument('--turns', type=int, default=5, help='of chats')
    parser.add_argument('--data', type=local_path, help='.jsonl, .jsonl.gz or .parquet file of conversations')
    parser.add_argument('--prompt-chars', type=int, default=1000, help='longest message that is taken from it')
    parser.add_argument('--max-tokens', type=int, default=128, help='of an answer')
    parser.add_argument('--temperature', type=float, default=1.0)
    parser.add_argument('--top-p', type=float, default=1.0)
    parser.add_argument('--seconds', type=float, default=300.0, help='max time for an answer')
    parser.add_argument('--seed', type=int, default=0, help='of made up messages and of sampling')
    parser.add_argument('--offline', metavar='MODEL', help='as tools.chat names assistants; a side of `streams`')
    parser.add_argument('--pid', nargs='+', type=int, default=[], help='processes of the servers, for soak')
    parser.add_argument('--output', type=local_path, default=pathlib.Path('serving_load.json'))
    options = parser.parse_args(arguments)
    for name in ('requests', 'repeats', 'turns', 'max_tokens', 'prompt_chars', 'streams'):
        value = getattr(options, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f'--{name.replace("_", "-")}: expected at least 1, found {value}')
    try:
        measure(options)
    except (*USER_ERRORS, ValueError, SideError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    run_program(main)
