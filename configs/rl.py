"""RL-trains an assistant against one simulator, with a reward model that another run trained.

    python -m simrl.main --config=configs/rl.py --config.data.folder=FOLDER

The reward model is that of configs/reward_model.py's own run; --config.reward_stage names another's stage folder. The
simulator is the prompted one (role_play); for the fine-tuned one of configs/sft_user.py add
--config.simulator=fine_tuned --config.simulator_stage=runs/sft_user/sft/user. With --config.rl.trained=user the
simulator is trained against the frozen assistant; add --config.talking.role_play.sampling.top_p=1.0, as the trained
side is sampled by temperature alone. Sizes as of smollm2.py.
"""

from ml_collections import ConfigDict, config_dict

from configs import smollm2


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: a size of smollm2.py."""
    whole = smollm2.get_config(arg)
    fields = ('model', 'data', 'talking', 'scale', 'rl', 'compute')
    return ConfigDict(
        {
            'job': 'rl',
            **{field: whole[field] for field in fields},
            'simulator': 'role_play',  # or fine_tuned
            'simulator_stage': config_dict.placeholder(str),  # folder of a fine-tuned simulator; None: the model itself
            'reward_stage': 'runs/reward_model/reward_model/train',  # folder of a reward model
            'seed': 0,  # of the training run
        }
    )
