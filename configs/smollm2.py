"""The whole experiment with SmolLM2-135M-Instruct on people's conversations.

    python -m simrl.main --config=configs/smollm2.py --config.data.folder=FOLDER

Sized for 40 minutes on one H100; `smollm2.py:cpu` for 45 minutes on 2 cores, without the arms persona and few_shot;
`smollm2.py:smoke` runs the same stages on a tiny random model with this tokenizer. FOLDER holds conversations.jsonl.gz
and preferences.jsonl.gz. The model comes from the Hugging Face hub, or from a file or folder named by
--config.model.source. A language model may give the reward in the reward model's place, with
--config.reward.by=local_judge; by default it is the model itself. A panel of endpoints is set in a config file:
config.reward = to_config_dict(RewardSettings('panel', panel=PanelSettings({NAME: EndpointSettings(URL, MODEL)}))).
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from simrl.conversations.batches import BatchSettings
from simrl.experiments.fitting import Half, RewardModelSettings, UserSFTSettings
from simrl.experiments.pretrained_settings import (
    ConversationSettings,
    PretrainedSettings,
    PretrainedSimulator,
    ReplySettings,
)
from simrl.experiments.settings import Compute, EvaluationSettings
from simrl.experiments.sources import DataSettings, ModelSettings, RandomModel
from simrl.models.transformer import Execution
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits, Resampling
from simrl.run.config import to_config_dict
from simrl.simulators.person import FewShotSettings
from simrl.simulators.prompts import GUIDELINES
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from simrl.training.preference import PreferenceSettings
from simrl.training.sft import SFTSettings

LENGTHS = (256, 512, 1024)  # tokens of a row, which is one conversation


def reward_model(half: Half, seed: int) -> RewardModelSettings:
    optimizer = OptimizerSettings(5e-5, 'linear', warmup_steps=8, end_fraction=0.1)
    return RewardModelSettings(PreferenceSettings(80, BatchSettings(32, LENGTHS, seed), optimizer), half)


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: '' (one GPU), 'cpu' or 'smoke'."""
    if arg not in ('', 'cpu', 'smoke'):
        raise ValueError(f"smollm2.py: unknown size {arg!r}, expected '', 'cpu' or 'smoke'")
    config = to_config_dict(
        PretrainedSettings(
            model=ModelSettings('HuggingFaceTB/SmolLM2-135M-Instruct'),
            data=DataSettings(pathlib.Path('data'), on_bad_rows='drop'),
            user_sft=UserSFTSettings(
                SFTSettings(
                    160,
                    BatchSettings(32, LENGTHS),
                    OptimizerSettings(5e-5, 'cosine', warmup_steps=16, end_fraction=0.1),
                )
            ),
            reward_model=reward_model('first', seed=0),
            held_out_reward_model=reward_model('second', seed=1),
            conversation=ConversationSettings(
                # Openings are those that fit into 384 tokens; the rest is for what persona and few_shot are told.
                Limits(turns=4, prompt_tokens=576, assistant_tokens=160, user_tokens=160),
                reserved_prompt_tokens=192,
            ),
            scale=ReplySettings(openings=256),
            arms={
                'role_play': PretrainedSimulator('role_play'),
                'persona': PretrainedSimulator('role_play', intent='where_known', guidelines=tuple(GUIDELINES)),
                'few_shot': PretrainedSimulator('role_play', intent='where_known', few_shot=FewShotSettings()),
                'fine_tuned': PretrainedSimulator('fine_tuned', repeats=Resampling()),
            },
            rl=RLSettings(
                steps=60,
                prompts_per_step=16,
                samples_per_prompt=8,
                row_buckets=LENGTHS,
                algorithm=AlgorithmSettings('gae', kl='k3', kl_coef=0.01, minibatches=2, microbatches=4),
                optimizer=OptimizerSettings(2e-6),
            ),
            evaluation=EvaluationSettings(seed=1),
            compute=Compute(
                training=Execution('bfloat16', remat='full'),
                sampling=Execution('bfloat16', remat='full'),
                loop=LoopSettings(log_every=5, evaluate_every=160),
            ),
        )
    )
    if arg == 'cpu':
        shrink(
            config,
            lengths=(128, 256),
            # The longest prompt is role-play's; the assistant's is 64 tokens shorter, so that its rows stay below 256.
            # 18 of 1,305 training openings are too long, and none of 129 held-out ones.
            prompt_tokens=152,
            message_tokens=48,
            sft_steps=20,
            reward_steps=14,
            rl_steps=4,
            microbatches=2,
            held_out=24,
            openings=24,
            checkpoint_every=10,
        )
    elif arg == 'smoke':
        shrink(
            config,
            lengths=(256,),
            prompt_tokens=192,
            message_tokens=12,
            sft_steps=3,
            reward_steps=3,
            rl_steps=2,
            microbatches=1,
            held_out=8,
            openings=16,
            checkpoint_every=1,
        )
        config.model.random = to_config_dict(
            RandomModel(32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=64, max_positions=2048)
        )
    return config


def shrink(
    config: ConfigDict,
    *,
    lengths: tuple[int, ...],
    prompt_tokens: int,
    message_tokens: int,
    sft_steps: int,
    reward_steps: int,
    rl_steps: int,
    microbatches: int,
    held_out: int,
    openings: int,
    checkpoint_every: int,
) -> None:
    """Makes the experiment small enough for a CPU."""
    del config.arms['persona'], config.arms['few_shot']

    def steps(number: int) -> dict[str, Any]:
        batch = {'batch_size': 4, 'lengths': lengths}
        return {'steps': number, 'batch': batch, 'optimizer': {'warmup_steps': number // 10}}

    limits = {'assistant_tokens': message_tokens, 'user_tokens': message_tokens, 'prompt_tokens': prompt_tokens}
    reward_model = {'preference': steps(reward_steps), 'held_out': 2 * held_out}
    execution = {'dtype': 'float32', 'remat': 'dots'}
    config.update(
        {
            'user_sft': {'sft': steps(sft_steps), 'held_out': held_out},
            'reward_model': reward_model,
            'held_out_reward_model': reward_model,
            'conversation': {'limits': {'turns': 2, **limits}, 'reserved_prompt_tokens': 0},
            'scale': {'openings': openings, 'batch_size': openings},
            'rl': {
                'steps': rl_steps,
                'prompts_per_step': 4,
                'samples_per_prompt': 2,
                'row_buckets': lengths,
                'algorithm': {'minibatches': 1, 'microbatches': microbatches},
            },
            'evaluation': {'people': openings, 'matrix': openings // 2, 'batch_size': openings // 2},
            'compute': {
                'mesh': {'data': 1},
                'training': execution,
                'sampling': execution,
                'loop': {'log_every': 1, 'checkpoint_every': checkpoint_every, 'evaluate_every': sft_steps},
            },
        }
    )
