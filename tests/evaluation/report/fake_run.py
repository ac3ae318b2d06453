"""Plausible results of a run that never was: for tests of the report, and to look at it.

python -m tests.evaluation.report.fake_run FOLDER [SEEDS] [many]

The folder is then a finished run for `python -m tools.report FOLDER`, too.
"""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from simrl.evaluation.comparisons import compare_arms
from simrl.evaluation.forecast import RankCorrelation
from simrl.evaluation.matrix import transfers
from simrl.evaluation.outcomes import Outcomes, compare, outcomes_of, summarise
from simrl.evaluation.report import gallery, sections
from simrl.evaluation.report.drawing import Drawing, looks_of
from simrl.evaluation.report.report import console_table, write_report
from simrl.evaluation.results.conversations import ConversationsResult, Message, ShownConversation, ShownExample
from simrl.evaluation.results.files import Results, write
from simrl.evaluation.results.measures import (
    Arm,
    ExperimentResult,
    MeasureResult,
    MeasureScores,
    MeasureWords,
    Run,
    ScoresResult,
)
from simrl.evaluation.results.simulators import (
    FidelityResult,
    ForecastResult,
    MatrixResult,
    SimulatorFidelity,
    SimulatorForecast,
)
from simrl.evaluation.results.training import TimingsResult, TrainingCurve, TrainingResult
from simrl.evaluation.statistics import Estimate
from simrl.evaluation.win_rate import Prefer, prefer_higher
from tests.evaluation.made_up import vote
from tests.evaluation.report.fake_judges import HOSTILE, add_all

# kind, and its assistants' mean share met, share of people who leave, turns, how often each first act is done
ARMS = {
    'role_play': ('prompted', 0.62, 0.42, 1.7, (0.99, 0.01, 0.0, 0.0)),
    'persona': ('prompted', 0.72, 0.31, 2.2, (0.73, 0.20, 0.07, 0.0)),
    'sft 7b': ('fine-tuned', 0.88, 0.18, 3.6, (0.01, 0.80, 0.19, 0.0)),
    'truth': ('people', 0.93, 0.10, 3.4, (0.01, 0.85, 0.14, 0.0)),
}
OWN_RATE = {'against_intent': 0.011}
SIZES = {'role_play': 135_000_000, 'persona': 135_000_000, 'sft 7b': 7_000_000_000}
INITIAL = ('', 0.62, 0.40, 3.0, (0.33, 0.40, 0.17, 0.10))
ACTS = ('propose', 'ask', 'open', 'chatter')
SETTINGS = {'world': {'seed': 0, 'dial': 1.0}, 'rl': {'ppo': {'clip': 0.2}, 'note': '/a/very/long/path' * 12}}
PEOPLE = MeasureWords('Satisfaction of new people', 'satisfaction', 'people', 'The share of the intent met.')
OPENINGS = MeasureWords('Replies to held-out openings', 'reward-model score', 'openings', 'Scores of one reply.')


def outcomes_like(assistant: str, looks: tuple, people: int, random: np.random.Generator) -> Outcomes:
    _, met, leaving, turns, acts = looks
    left = random.random(people) < leaving
    share = random.binomial(4, met + random.normal(0, 0.02), people) / 4
    spoken = np.clip(random.poisson(turns, people), 1, 5)
    names = [f'people-test-{k}' for k in range(people)]
    columns = {
        'example': names,
        'cluster': names,
        'cause': [''] * people,
        'score': (np.where(left, 0.0, share) - 0.03 * spoken).tolist(),
        'share_met': share.tolist(),
        'end': ['left' if x else 'accepted' if random.random() < 0.9 else 'turns' for x in left],
        'assistant_turns': spoken.tolist(),
        'first_act': random.choice(ACTS, people, p=acts).tolist(),
        'truncated': (random.random(people) < 0.01).astype(int).tolist(),
        'user_truncated': (random.random(people) < 0.003).astype(int).tolist(),
        'assistant_tokens': (spoken * 5 + random.poisson(3, people)).tolist(),
    }
    return outcomes_of(assistant, columns)


def fake_results(seeds: int = 3, people: int = 300, more_arms: int = 0, measures: int = 1) -> Results:
    """The concierge world's four arms and others; a second measure is a reward model's."""
    random = np.random.default_rng(0)
    arms = ARMS | {f'another arm {k}': ARMS['persona'] for k in range(more_arms)}
    experiment = ExperimentResult(
        arms={name: Arm(looks[0], name == 'truth', parameters=SIZES.get(name)) for name, looks in arms.items()},
        runs={f'{arm}/seed-{k}': Run(arm, k) for k in range(seeds) for arm in arms},
        measures=('people', 'held_out_reward_model')[:measures],
        caution='It is no evidence about real people.',
    )
    assistants = {'initial': INITIAL, **{name: arms[run.arm] for name, run in experiment.runs.items()}}
    found = {
        measure: {name: outcomes_like(name, looks, people, random) for name, looks in assistants.items()}
        for measure in experiment.measures
    }
    users = {arm: f'{arm}/seed-{{}}' if arm == 'sft 7b' else arm for arm in arms if arm != 'truth'}
    means = np.clip(random.normal(0.6, 0.2, (len(users) + 1, len(assistants))), 0.05, 0.95)
    met: dict[str, dict[str, np.ndarray]] = {
        name: {
            user.format(seed): means[row, column : column + 1]
            for row, user in enumerate(users.values())
            for seed in ([experiment.runs[name].seed] if name in experiment.runs else range(seeds))
        }
        for column, name in enumerate(assistants)
    }
    runs = {arm: {experiment.runs[x].seed: x for x in experiment.assistants_of(arm)} for arm in arms}
    simulators = {user.format(k): arm for arm, user in users.items() for k in range(seeds)}
    steps = tuple(range(1, 51))
    rise = 1 - np.exp(-np.array(steps) / 12)
    rates = {'words_per_message': 3.1, 'typo_rate': 0.166, 'against_intent': None}
    nats = Estimate(1.15, 1.1, 1.2, 900, 300, 0.95)
    talk = ShownConversation(
        (
            Message('user', 'hi i want chaep thai please'),
            Message('assistant', 'which area and time ?'),
            Message('user', 'um dinner , it is my birthday'),
            Message('assistant', 'try thai cheap north dinner'),
            Message('user', 'ok thanks'),
        ),
        *(0.94, {'share_met': 1.0}, 'accepted'),
    )
    rude = ShownConversation(
        (Message('user', HOSTILE), Message('assistant', 'a' * 300), Message('user', 'forget it')),
        *(-0.03, {'share_met': 0.0}, 'left'),
    )
    shown = {name: rude if name.startswith('role_play') else talk for name in assistants if not name.endswith('2')}
    traits = {'tell_more': 0.21, 'typo': 0.4, 'patience': 2.0}
    return Results(
        experiment=experiment,
        measures={
            'people': measure_result('people', PEOPLE, found['people'], runs, vote),
            **{
                name: measure_result(name, OPENINGS, found[name], runs, prefer_higher)
                for name in experiment.measures[1:]
            },
        },
        scores=ScoresResult(
            {
                name: MeasureScores(tuple(range(people)), {who: tuple(x.score.tolist()) for who, x in outcomes.items()})
                for name, outcomes in found.items()
            }
        ),
        matrix=MatrixResult(
            score='satisfaction',
            users=(*users, 'people'),
            people='people',
            assistants=tuple(assistants),
            mean=tuple(map(tuple, means.tolist())),
            low=tuple(map(tuple, (means - 0.02).tolist())),
            high=tuple(map(tuple, (means + 0.02).tolist())),
            conversations=((1024,) * len(assistants),) * (len(users) + 1),
            transfers=transfers(runs, experiment.arms, simulators, met),
        ),
        fidelity=FidelityResult(
            rates,
            {
                arm: SimulatorFidelity(3.15, dataclasses.replace(nats, mean=1.15 + 0.1 * k), rates | OWN_RATE)
                for k, arm in enumerate(users)
            },
        ),
        training=TrainingResult(
            {
                name: TrainingCurve(
                    step=steps,
                    reward=tuple((0.4 + 0.45 * rise * assistants[name][1] + random.normal(0, 0.015, 50)).tolist()),
                    end_signal=tuple(np.clip(0.6 + 0.3 * rise + random.normal(0, 0.02, 50), 0, 1).tolist()),
                    kl=(None, *(0.3 * rise[1:]).tolist()),
                    zero_variance=tuple((0.2 * rise).tolist()),
                    message_tokens=tuple((6 + 4 * rise + random.normal(0, 0.3, 50)).tolist()),
                    truncated=tuple((0.02 * rise).tolist()),
                    unjudged=(0.0,) * 49 + (0.02,),
                    ends={'signal': (0.8,) * 50, 'turns': tuple((0.2 * rise).tolist()), 'failure': (0.0,) * 50},
                )
                for name in experiment.runs
            }
        ),
        conversations=ConversationsResult(
            {
                'people': tuple(
                    ShownExample(f'people-test-{k}', 'food thai price cheap', traits, shown) for k in range(2)
                )
            }
        ),
        forecast=forecast_like(users),
        timings=TimingsResult({'world': 12.3, **{f'rl/{name}': 88.0 for name in experiment.runs}}),
    )


def forecast_like(arms: Iterable[str]) -> ForecastResult:
    """A forecast that orders arms as they are listed; the last one's gradient is hidden by noise."""
    names = list(arms)
    cosines = [Estimate(0.1 + 0.1 * k, 0.1 * k, 0.2 + 0.1 * k, 64, 64, 0.95) for k in range(len(names))]
    gains = [Estimate(0.01 * k, 0.01 * k - 0.005, 0.01 * k + 0.005, 64, 64, 0.95) for k in range(len(names))]
    return ForecastResult(
        people='People themselves stand for people.',
        people_stage='forecast/people',
        measure='people',
        examples=64,
        samples=8,
        n=8,
        simulators={
            name: SimulatorForecast(
                cosine=None if name == names[-1] else cosine,
                best_of_n=gain,
                reason='its gradient is not told from noise' if name == names[-1] else None,
                stages=(f'forecast/{name}',),
            )
            for name, cosine, gain in zip(names, cosines, gains, strict=True)
        },
        correlations=(RankCorrelation('cosine', 'win_rate', len(names), 0.8, 0.2, 1.0, 0.1, 0.95),),
    )


def measure_result(
    name: str, words: MeasureWords, outcomes: dict[str, Outcomes], runs: dict[str, dict[int, str]], prefer: Prefer
) -> MeasureResult:
    compared = compare(outcomes, prefer)
    arms, differences = compare_arms(outcomes, compared, runs, 'truth', resamples=500)
    number = len(outcomes['initial'].examples)
    assistants = summarise(outcomes, compared, resamples=500)
    return MeasureResult(name, words, number, number, assistants, arms, differences)


def training_rows(number: int, steps: int = 50) -> Iterator[dict[str, Any]]:
    """Conversations as RL keeps them: some with a reward for each reply, some without one, all hostile."""
    random = np.random.default_rng(1)
    for k in range(number):
        replies = int(random.integers(1, 4))
        messages = [
            {'role': role, 'content': f'{text} {k} {HOSTILE}', 'tokens': 4, 'truncated': False}
            for _ in range(replies)
            for role, text in (('user', 'something thai'), ('assistant', 'try north'))
        ]
        reward: Any = None if k % 50 == 7 else round(float(random.random()), 3)
        each = [reward] * replies if k % 3 == 0 else reward
        yield {
            **{
                'step': 1 + k * steps // number,
                'example': f'people-train-{k // 4}',
                'source': 'people',
                'sample': k % 4,
            },
            **{'seed': 0, 'told': HOSTILE, 'messages': messages, 'end_reason': ('signal', 'turns')[k % 2]},
            **{'reward': each, 'parts': {'share_met': each, 'left': 0.0}, 'cause': 6 if reward is None else 0},
        }


def write_training(folder: pathlib.Path, experiment: ExperimentResult, number: int) -> dict[str, pathlib.Path]:
    """Keeps `number` conversations in the RL stage of each assistant; by assistant, the file."""
    kept = {name: folder / 'rl' / name / 'conversations' / 'rl.jsonl' for name in experiment.runs}
    for path in kept.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(f'{json.dumps(row)}\n' for row in training_rows(number)))
    return kept


def draw_few(monkeypatch) -> None:
    """Leaves a report few of its figures, which take time: one of training."""
    every = gallery.drawings_of

    def few(*arguments: Any) -> dict[str, list[Drawing]]:
        return {name: found[:1] if name == 'training' else [] for name, found in every(*arguments).items()}

    monkeypatch.setattr(gallery, 'drawings_of', few)


def page_text(results: Results) -> str:
    """The page of the report without its figures, which take time."""
    drawings = collections.defaultdict[str, list[Drawing]](list)
    return sections.report_page(results, {}, looks_of(results.experiment), drawings)


if __name__ == '__main__':
    target = pathlib.Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    (target / 'config.json').write_text(json.dumps(SETTINGS))
    results = fake_results(int(sys.argv[2]) if len(sys.argv) > 2 else 3, 2000, *((8, 2) if sys.argv[3:] else ()))
    write(results, target)
    add_all(results.experiment, target)
    print(write_report(results, target, kept=write_training(target, results.experiment, 900))[0])
    print(console_table(results))
