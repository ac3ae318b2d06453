"""The command: its options, all participants at once, and what is printed of them."""

import argparse
import asyncio
import collections
import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Sequence

import numpy as np

import tools.rehearse
from simrl.remote.client import Endpoint
from simrl.remote.settings import EndpointError, EndpointSettings
from simrl.run.config import from_config_dict, local_path
from simrl.run.progress import Progress
from simrl.study.participant import Participant, fold_all
from simrl.study.plan import blind_clustering
from simrl.study.store import StoreError, read_events
from simrl.study.text_files import TextError, read_texts
from simrl.study.votes import votes
from tools.rehearse.account import differences
from tools.rehearse.people import Modelled, Person, Scripted
from tools.rehearse.walk import Habits, Place, Walk, Walker, WalkError

MAX_LINES = 20  # differences that are printed


async def walk_all(
    place: Place, people: Sequence[Person], habits: Habits, *, at_once: int, seed: int
) -> tuple[list[Walk], list[str]]:
    """All participants' walks, so many at once; and what stopped those who could not go on."""
    gate, stopped = asyncio.Semaphore(at_once), []
    with Progress('participants', len(people)) as progress:

        async def one(number: int, person: Person) -> Walk:
            draw = random.Random(f'{seed} {number}')
            walker = Walker(place, f'rehearsal-{seed}-{number}', person, habits, draw)
            async with gate:
                try:
                    await walker.run()
                except (WalkError, RuntimeError, ValueError) as error:
                    stopped.append(f'{walker.walk.panel_id} ({walker.walk.id}): {error}')
            progress.update(1)
            return walker.walk

        return list(await asyncio.gather(*(one(*numbered) for numbered in enumerate(people)))), stopped


def print_times(walks: Sequence[Walk]) -> None:
    """Times by path, of answers that came."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for walk in walks:
        for action in walk.actions:
            if action.seconds is not None:
                times[action.path].append(1000 * action.seconds)
    everything = [x for path, found in times.items() if path != '/state' for x in found]
    print(f'\n{"page or action":<16}{"number":>8}{"p50 ms":>9}{"p95 ms":>9}{"max ms":>9}')
    for path, found in (*sorted(times.items()), ('all but /state', everything)):
        p50, p95 = np.percentile(found, (50, 95)) if found else (0, 0)
        print(f'{path:<16}{len(found):>8}{p50:>9.0f}{p95:>9.0f}{max(found, default=0):>9.0f}')


def print_outcomes(walks: Sequence[Walk], states: Sequence[Participant]) -> None:
    seen = collections.Counter(action.seen for walk in walks for action in walk.actions)
    ends = collections.Counter(state.outcome or f'left at {state.step}' for state in states)
    print('\nanswers: ' + ', '.join(f'{count} {name}' for name, count in seen.most_common()))
    print('participants: ' + ', '.join(f'{count} {name}' for name, count in ends.most_common()))
    voids = sum(turn.voids for state in states for talk in (state.training, state.main) if talk for turn in talk.turns)
    print(f'void tries of turns: {voids}')


def print_sizes(states: Sequence[Participant]) -> None:
    """Prints what the votes say about the size of a study, and nothing about preferences."""
    found = votes(states, 'rehearsal')
    if not found:
        print('votes: none')
        return
    pairs = collections.Counter(' : '.join(vote.pair) for vote in found)
    known = blind_clustering(
        np.array([vote.preference for vote in found]), [v.participant for v in found], [v.pair for v in found]
    )
    print('votes: ' + ', '.join(f'{count} {pair}' for pair, count in sorted(pairs.items())))
    left = sum(vote.first_was_left for vote in found) / len(found)
    print(f"the pair's first model was on the left in {left:.1%} of {len(found)} votes")
    icc = 'not known' if known.icc is None else f'{known.icc:.2f} [{known.low:.2f}, {known.high:.2f}] (80%)'
    print(f'ties: {known.ties:.1%}; clustering: {icc}; participants who voted: {known.participants}')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        'python -m tools.rehearse',
        description=tools.rehearse.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('url', help='of the study, for instance http://127.0.0.1:8080')
    parser.add_argument('--store', required=True, help='of the study, to hold the answers against')
    parser.add_argument('--participants', type=int, default=40)
    parser.add_argument('--at_once', type=int, default=0, help='default: all')
    parser.add_argument('--seed', type=int, default=0, help='another one: other participants')
    parser.add_argument('--least', type=int, default=200, help='words of the final text, as of the study')
    parser.add_argument('--texts', type=local_path, default=None, help='the file of texts of the study, if it has one')
    parser.add_argument(
        '--person', type=json.loads, default=None, help='an endpoint as JSON: {"url": ..., "model": ...}'
    )
    parser.add_argument('--max_tokens', type=int, default=120, help="of a model's message")
    for field in dataclasses.fields(Habits):
        parser.add_argument(f'--{field.name}', type=float, default=field.default)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, TextError, StoreError, EndpointError) as error:
        sys.exit(f'error: {error}')


def run(options: argparse.Namespace) -> None:
    habits = Habits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Habits)})
    texts = read_texts(None if options.texts is None else pathlib.Path(options.texts))
    place = Place(options.url, texts, options.least)
    count = options.participants
    if count < 1 or options.at_once < 0:
        raise ValueError(f'--participants: expected at least 1 (at once 0 or more), found {count}, {options.at_once}')
    draws = [random.Random(f'{options.seed} person {number}') for number in range(count)]
    before = max((event.number for event in read_events(options.store)), default=0)
    settings = {'at_once': options.at_once or count, 'seed': options.seed}
    if options.person is None:
        scripted = [Scripted(draw) for draw in draws]
        walks, stopped = asyncio.run(walk_all(place, scripted, habits, **settings))
    else:
        with Endpoint(from_config_dict(EndpointSettings, options.person, '--person')) as endpoint:
            failed = collections.Counter[str]()
            modelled = [Modelled(endpoint, draw, options.max_tokens, failed) for draw in draws]
            walks, stopped = asyncio.run(walk_all(place, modelled, habits, **settings))
            print(f"answers of the participants' model: {endpoint.usage().calls}, not used: {dict(failed)}")
    events = read_events(options.store)
    walked = {walk.id for walk in walks}
    states = [state for id, state in fold_all(events).items() if id in walked]
    print_times(walks)
    print_outcomes(walks, states)
    print_sizes(states)
    wrong = differences(walks, [event for event in events if event.number > before])
    for line in (*stopped, *wrong)[:MAX_LINES]:
        print(line, file=sys.stderr)
    confirmed = sum(a.seen == 'confirmed' and bool(a.fields) for walk in walks for a in walk.actions)
    if stopped or wrong:
        sys.exit(f'error: {len(stopped)} participants could not go on; {len(wrong)} differences from the store')
    print(f'accounted for: {confirmed} confirmed answers, each once in the store, and nothing else')
