"""A run directory with plausible results of a run that never was: for tests of the report, and to look at it.

python -m tests.evaluation.fake_run FOLDER [SEEDS] [small]
"""

import json
import math
import pathlib
import sys
from typing import Any

import numpy as np

from simrl.evaluation.comparisons import claims_over_seeds
from simrl.evaluation.people import Outcomes, compare, outcomes_of, summarise_people
from simrl.evaluation.report.report import console_table, write_report
from simrl.run import config

SCALE = 0.25 / math.log(9)
# mean share met, share of people who leave, assistant turns, how often each first act is done
ARMS = {
    'initial': (0.62, 0.40, 3.0, (0.33, 0.40, 0.17, 0.10)),
    'role_play': (0.62, 0.42, 1.7, (0.99, 0.01, 0.0, 0.0)),
    'persona': (0.72, 0.31, 2.2, (0.73, 0.20, 0.07, 0.0)),
    'fine_tuned': (0.88, 0.18, 3.6, (0.01, 0.80, 0.19, 0.0)),
    'oracle': (0.93, 0.10, 3.4, (0.01, 0.85, 0.14, 0.0)),
}
ACTS = ('propose', 'ask', 'open', 'chatter')
HOSTILE = '<script>alert("& no escape")</script> $x_1$ \\frac'  # what a model may say


def vote(satisfaction: float, other: float) -> float:
    return 1 / (1 + math.exp((other - satisfaction) / SCALE))


def outcomes_like(assistant: str, arm: str, people: int, random: np.random.Generator) -> Outcomes:
    met, leaving, turns, acts = ARMS[arm.partition('-')[0]]
    met += {'small': -0.06, 'large': 0.03}.get(arm.partition('-')[2], 0.0)
    met += random.normal(0, 0.02)
    rows = []
    for _ in range(people):
        left = bool(random.random() < leaving)
        share = float(random.binomial(4, met)) / 4
        spoken = int(np.clip(random.poisson(turns), 1, 5))
        rows.append(
            {
                'satisfaction': (0.0 if left else share) - 0.03 * spoken,
                'share_met': share,
                'left': left,
                'accepted': bool(not left and random.random() < 0.9),
                'assistant_turns': spoken,
                'first_act': str(random.choice(ACTS, p=acts)),
                'truncated': int(random.random() < 0.01),
                'user_truncated': int(random.random() < 0.003),
            }
        )
    return outcomes_of(assistant, rows)


def fake_results(seeds: int = 3, people: int = 300, sizes: tuple[str, ...] = ('',)) -> dict[str, Any]:
    """File name -> what it holds."""
    random = np.random.default_rng(0)
    arms = ['role_play', 'persona', 'fine_tuned', 'oracle']
    arms += [f'{arm}-{size}' for arm in ('role_play', 'fine_tuned') for size in sizes if size]
    assistants = {'initial': 'initial', **{f'{arm}/seed-{k}': arm for arm in arms for k in range(seeds)}}
    found = {name: outcomes_like(name, arm, people, random) for name, arm in assistants.items()}
    names = [f'people-test-{k}' for k in range(people)]
    users = [arm for arm in arms if arm != 'oracle']
    compared = compare(found, vote=vote)
    means = np.clip(random.normal(0.6, 0.2, (len(users) + 1, len(assistants))), 0.05, 0.95)
    means[-1] = [float(outcomes.satisfaction.mean()) for outcomes in found.values()]
    met: dict[str, dict[str, float]] = {name: {} for name in assistants}
    for place, name in enumerate(assistants):
        for user, row in zip(users, means, strict=False):
            for k in range(seeds) if user.startswith('fine_tuned') else ['']:
                if name == 'initial' or k == '' or name.endswith(f'-{k}'):
                    met[name][f'{user}/seed-{k}' if k != '' else user] = float(row[place])
    statistics = {
        'words_per_message': 3.1,
        'opening_attributes': 1.03,
        'typo_rate': 0.166,
        'against_intent': 0.0,
        'left': 0.4,
        'accepted': 0.52,
        'messages': 3.4,
    }
    steps = list(range(1, 51))
    curves = {}
    for name, arm in assistants.items():
        if arm != 'initial':
            rise = 1 - np.exp(-np.array(steps) / 12)
            reward = 0.4 + 0.45 * rise * ARMS[arm.partition('-')[0]][0] + random.normal(0, 0.015, 50)
            curves[name] = {
                'step': steps,
                'reward': reward.tolist(),
                'end_signal': np.clip(0.6 + 0.3 * rise + random.normal(0, 0.02, 50), 0, 1).tolist(),
                'kl': [None, *(0.3 * rise[1:]).tolist()],
                'no_spread': (0.2 * rise).tolist(),
            }
    talk = {
        'messages': [
            {'role': 'user', 'content': 'hi i want chaep thai please'},
            {'role': 'assistant', 'content': 'which area and time ?'},
            {'role': 'user', 'content': 'um dinner , it is my birthday'},
            {'role': 'assistant', 'content': 'try thai cheap north dinner'},
            {'role': 'user', 'content': 'ok thanks'},
        ],
        'satisfaction': 0.94,
        'share_met': 1.0,
        'end': 'accepted',
    }
    rude = {
        'messages': [
            {'role': 'user', 'content': HOSTILE},
            {'role': 'assistant', 'content': 'a' * 300},
            {'role': 'user', 'content': 'forget it'},
        ],
        'satisfaction': -0.03,
        'share_met': 0.0,
        'end': 'left',
    }
    shown = {
        name: rude if name.startswith('role_play') else talk for name in assistants if not name.endswith(('2', '3'))
    }
    return {
        'results/people.json': config.to_dict(summarise_people(found, compared, names, dial=1.0, resamples=500)),
        'results/claims.json': config.to_dict(claims_over_seeds(found, compared, names, met=met, resamples=500)),
        'results/matrix.json': {
            'users': [*users, 'people'],
            'assistants': list(assistants),
            'mean': means.tolist(),
            'low': (means - 0.02).tolist(),
            'high': (means + 0.02).tolist(),
            'conversations': [[1024] * len(assistants)] * (len(users) + 1),
        },
        'results/fidelity.json': {
            'people': statistics,
            'simulators': {
                user: {
                    **statistics,
                    'perplexity': 3.15,
                    'nats_per_token': {
                        'mean': 1.15,
                        'low': 1.1,
                        'high': 1.2,
                        'num_observations': 900,
                        'num_clusters': 300,
                        'level': 0.95,
                    },
                }
                for user in users
            },
        },
        'results/training.json': curves,
        'results/conversations.json': [
            {
                'person': f'people-test-{k}',
                'intent': 'food thai price cheap area any time dinner',
                'traits': {'tell_more': 0.21, 'typo': 0.4, 'patience': 2.0},
                'talks': shown,
            }
            for k in range(2)
        ],
        'results/timings.json': {'stages': {'world': 12.3, **{f'rl/{name}': 88.0 for name in curves}}},
        'config.json': {
            'job': 'known_answer',
            'world': {'seed': 0, 'dial': 1.0},
            'seeds': list(range(seeds)),
            'rl': {'ppo': {'clip': 0.2}, 'note': '/a/very/long/path' * 12},
        },
    }


def write(folder: pathlib.Path, files: dict[str, Any]) -> None:
    (folder / 'results').mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


if __name__ == '__main__':
    target = pathlib.Path(sys.argv[1])
    write(
        target,
        fake_results(
            seeds=int(sys.argv[2]) if len(sys.argv) > 2 else 3,
            people=2000,
            sizes=('small', '', 'large') if sys.argv[3:] else ('',),
        ),
    )
    print(write_report(target))
    print(console_table(target))
