"""Trains a reward model on people's choices, and measures it beside "longer wins".

    python -m simrl.main --config=configs/reward_model.py --config.data.folder=FOLDER

Sizes as of smollm2.py: `reward_model.py:cpu`, `reward_model.py:smoke`. It reads all pairs of the training split; the
two reward models of smollm2.py read one half each.
"""

from ml_collections import ConfigDict

from configs import smollm2


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: a size of smollm2.py."""
    whole = smollm2.get_config(arg)
    fields = ('model', 'data', 'reward_model', 'compute')
    config = ConfigDict({'job': 'reward_model', **{field: whole[field] for field in fields}})
    config.reward_model.half = 'both'
    return config
