"""The experiment of quickstart.py with three sizes of simulators, longer trainings and eight training seeds.

    python -m simrl.main --config=configs/concierge.py

About two hours on two cores; `concierge.py:smoke` has the same arms in the sizes of quickstart.py:smoke. What came out
on 2,000 new people, mean satisfaction [95% t-interval over eight training seeds]; the initial assistant's is 0.320:

    role_play-small   0.310 [0.289, 0.331]      fine_tuned-small  0.470 [0.417, 0.524]
    role_play         0.369 [0.354, 0.384]      fine_tuned        0.734 [0.711, 0.757]
    role_play-large   0.375 [0.365, 0.384]      fine_tuned-large  0.742 [0.727, 0.757]
    persona           0.519 [0.489, 0.550]      oracle            0.786 [0.778, 0.794]

At equal size the simulator that was fine-tuned on people trains the better assistant: +0.160 [0.104, 0.217] small,
+0.365 [0.331, 0.398] medium, +0.367 [0.351, 0.384] large, sign-flip p .008 each. Medium and large fine-tuned ones do
not differ significantly. `python -m tools.controls` has the negative controls.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.quickstart import user_model
from simrl.experiments.concierge_settings import ConciergeSimulator
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
