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
    users = {
        'small': quickstart.user_model(16, 1, 12, 8, 64) if smoke else quickstart.user_model(32, 1, 1000, 1000, 32),
        'large': quickstart.user_model(48, 1, 12, 8, 64) if smoke else quickstart.user_model(128, 3, 1000, 1000, 32),
    }
    config.users.update(users)
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
