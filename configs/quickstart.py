"""The whole experiment in the concierge world, where the truth about people is known. No downloads.

    python -m simrl.main --config=configs/quickstart.py

7 to 15 minutes on 2 cores. Mean satisfaction when training against people themselves, over four steps, passed .70 by
step 12 with GRPO and seeds 0 and 1, and with PPO by steps 16 and 20. `quickstart.py:ppo` and `quickstart.py:grpo` name
the algorithm; without an argument it is GRPO. Eight seeds (`--config.seeds='(0,1,2,3,4,5,6,7)'`, 19 minutes) gave
role_play .370 [.359, .382], persona .549 [.511, .588], fine_tuned .702 [.686, .717] and oracle .743 [.732, .754] of
satisfaction, where the initial assistant has .326; each pair of arms differs (sign-flip p .008, .047 after Holm).

`quickstart.py:smoke` runs the same stages with two seeds in 90 seconds, too small to learn much.
"""

import jax
from ml_collections import ConfigDict

from simrl.conversations.batches import BatchSettings
from simrl.experiments.concierge_settings import (
    AssistantSettings,
    ConciergeSettings,
    ConciergeSimulator,
    UserModelSettings,
)
from simrl.experiments.concierge_setup import Corpora
from simrl.experiments.settings import Compute, EvaluationSettings, MeshSettings
from simrl.experiments.sources import RandomModel
from simrl.models.transformer import Execution
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.train import RLSettings
from simrl.rollouts.agents import Limits
from simrl.run.config import to_config_dict
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from simrl.training.sft import SFTSettings

ADVANTAGES = {'': 'grpo', 'grpo': 'grpo', 'ppo': 'gae', 'smoke': 'grpo'}  # by argument

# With models as small as these XLA takes longer to compile on a CPU than to compute. The first flag halves the time to
# compile the program of a message, and makes a training step about a tenth slower; XLA knows it up to JAX 0.10. The
# second avoids threads that one core cannot run at once. XLA does not start with a flag that it does not know: set
# --config.compute.xla_flags='()'.
FAST_COMPILATION = (
    *(('--xla_cpu_use_fusion_emitters=false',) if jax.__version_info__ < (0, 11) else ()),
    '--xla_cpu_parallel_codegen_split_count=1',
)


def model(model_dim: int, num_layers: int, seed: int) -> RandomModel:
    heads = model_dim // 16
    return RandomModel(
        model_dim, num_layers, heads, heads, 3 * model_dim, max_positions=512, tied_embedding=False, seed=seed
    )


def fitting(steps: int, batch_size: int, seed: int) -> SFTSettings:
    """Maximum likelihood on one role's messages."""
    return SFTSettings(
        steps,
        BatchSettings(batch_size, (40, 56, 72, 96, 128), seed),
        OptimizerSettings(3e-3, 'cosine', warmup_steps=min(30, steps // 3), end_fraction=0.05),
    )


def user_model(model_dim: int, num_layers: int, base_steps: int, steps: int, batch_size: int = 32) -> UserModelSettings:
    return UserModelSettings(
        model(model_dim, num_layers, seed=1), fitting(base_steps, batch_size, 1), fitting(steps, batch_size, 2)
    )


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: '' or 'grpo', 'ppo', 'smoke'."""
    if arg not in ADVANTAGES:
        raise ValueError(f'quickstart.py: unknown argument {arg!r}, expected one of {", ".join(map(repr, ADVANTAGES))}')
    config = to_config_dict(
        ConciergeSettings(
            corpora=Corpora(vocabulary=383, assistant=16000, base_user=12000, logs=8000, held_out=512),
            assistant=AssistantSettings(model(64, 2, seed=0), fitting(800, 32, seed=0)),
            users={'medium': user_model(64, 2, 1000, 700)},
            limits=Limits(turns=5, prompt_tokens=16, assistant_tokens=12, user_tokens=20),
            arms={
                **{kind: ConciergeSimulator(kind) for kind in ('role_play', 'persona', 'fine_tuned')},
                'oracle': ConciergeSimulator('people'),
            },
            seeds=(0, 1, 2),
            rl=RLSettings(
                steps=24,
                prompts_per_step=32,
                samples_per_prompt=8,
                row_buckets=(48, 64, 80, 96, 128, 200),
                algorithm=AlgorithmSettings(ADVANTAGES[arg], kl='k3', kl_coef=0.01, minibatches=2),
                optimizer=OptimizerSettings(1e-3),
            ),
            rl_people=4096,
            evaluation=EvaluationSettings(people=2000, block=1000, matrix=512, batch_size=256, shown=4),
            compute=Compute(
                training=Execution(log_prob_chunk=2048),
                loop=LoopSettings(saved_conversations=4, shown_conversations=1),
                mesh=MeshSettings(data=1),
                xla_flags=FAST_COMPILATION,
            ),
        )
    )
    if arg == 'smoke':
        shrink(config)
    return config


def shrink(config: ConfigDict) -> None:
    """Makes the experiment too small to learn much."""
    config.assistant = to_config_dict(AssistantSettings(model(32, 1, seed=0), fitting(12, 32, seed=0)))
    config.users.medium = to_config_dict(user_model(32, 1, 12, 8, batch_size=64))
    for sft in (config.assistant.sft, config.users.medium.base, config.users.medium.fine_tuning):
        sft.batch.lengths = (128,)  # a program each
    config.update(
        {
            'corpora': {'assistant': 600, 'base_user': 600, 'logs': 256, 'held_out': 64},
            'limits': {'turns': 3},
            'rl': {'steps': 3, 'prompts_per_step': 4, 'samples_per_prompt': 4, 'row_buckets': (128,)},
            'rl_people': 64,
            'seeds': (0, 1),
            'evaluation': {'people': 64, 'block': 64, 'matrix': 16, 'batch_size': 16, 'shown': 2},
            'compute': {'loop': {'checkpoint_every': 2}, 'xla_flags': ()},
        }
    )
