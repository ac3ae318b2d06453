"""The experiment of quickstart.py with three sizes of simulators and eight training seeds.

    python -m simrl.main --config=configs/concierge.py

A night on a laptop. `concierge.py:smoke` has the same arms in the sizes of quickstart.py:smoke.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.quickstart import user_model
from simrl.experiments.concierge import ConciergeSimulator
from simrl.run.config import to_config_dict

ARMS = {
    'role_play-small': ConciergeSimulator('role_play', 'small'),
    'role_play': ConciergeSimulator('role_play'),
    'role_play-large': ConciergeSimulator('role_play', 'large'),
    'persona': ConciergeSimulator('persona'),
    'fine_tuned-small': ConciergeSimulator('fine_tuned', 'small'),
    'fine_tuned': ConciergeSimulator('fine_tuned'),
    'fine_tuned-large': ConciergeSimulator('fine_tuned', 'large'),
    'oracle': ConciergeSimulator('people'),
}


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: an argument of quickstart.py."""
    config = quickstart.get_config(arg)
    config.arms = ConfigDict({name: to_config_dict(arm) for name, arm in ARMS.items()}, sort_keys=False)
    if arg == 'smoke':
        users = {'small': user_model(16, 1, 12, 8, 64), 'large': user_model(48, 1, 12, 8, 64)}
    else:
        sizes = {'small': (32, 1), 'medium': (64, 2), 'large': (96, 3)}
        users = {size: user_model(*shape, base_steps=1500, steps=1000) for size, shape in sizes.items()}
        config.seeds = tuple(range(8))
        config.corpora.logs = 12000
        config.rl.steps = 40
        config.compute.xla_flags = ()  # in a run this long, fast programs pay
    for size, user in users.items():
        config.users[size] = to_config_dict(user)
    return config
