"""The experiment of quickstart.py with three sizes of simulators and eight training seeds.

    python -m simrl.main --config=configs/concierge.py

Sized for a laptop overnight; `concierge.py:smoke` has the same arms in the sizes of quickstart.py:smoke.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: an argument of quickstart.py."""
    config = quickstart.get_config(arg)
    smoke = arg == 'smoke'
    if smoke:
        sizes = {'small': (16, 1, 12, 8, 64), 'large': (48, 1, 12, 8, 64)}
    else:
        sizes = {'small': (32, 1, 1500, 1000, 32), 'medium': (64, 2, 1500, 1000, 32), 'large': (96, 3, 1500, 1000, 32)}
        config.corpora.logs = 12000
        config.rl.steps = 40
        config.compute.xla_flags = ()  # it runs long enough for programs to be compiled well
    for size, shape in sizes.items():
        config.users[size] = quickstart.user_model(*shape)
    config.arms = (
        'role_play-small',
        'role_play',
        'role_play-large',
        'persona',
        'fine_tuned-small',
        'fine_tuned',
        'fine_tuned-large',
        'oracle',
    )
    config.seeds = (0,) if smoke else tuple(range(8))
    return config
