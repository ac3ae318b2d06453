"""The experiment of arXiv:2605.09808: one assistant for each user simulator, judged by two language models.

    python -m simrl.main --config=configs/paper.py:rpuser1,sftuser-14b --config.data.folder=FOLDER

For a TPU or GPU cluster; `--plan` checks all that can be checked with tokenizers alone. The argument names arms (none:
all of them) and one assistant, 1.5b, 3b (the default), 7b or llama. FOLDER is made by `python -m tools.prepare
wildchat`, and then `python -m tools.intents`, which writes intents. The judges are served elsewhere:
--config.reward.panel.judges.mistral.url=http://HOST:PORT/v1, and the same of held_out.

Behind each value stands where it is from: [paper], the paper's text or code; [trainer], the default of the trainer that
its code uses; [ours].
"""

import pathlib

from ml_collections import ConfigDict

from simrl.conversations.batches import BatchSettings
from simrl.experiments.fitting import Half, RewardModelSettings, UserSFTSettings
from simrl.experiments.judges import JudgeSettings, PanelSettings, RewardSettings
from simrl.experiments.pretrained_settings import (
    ConversationSettings,
    PretrainedSettings,
    PretrainedSimulator,
    ReplySettings,
)
from simrl.experiments.settings import Compute, EvaluationSettings
from simrl.experiments.sources import DataSettings, ModelSettings
from simrl.models.transformer import Execution
from simrl.remote.settings import EndpointSettings
from simrl.rl.algorithm import AlgorithmSettings
from simrl.rl.train import RLSettings
from simrl.rl.validation import ValidationSettings
from simrl.rollouts.agents import Limits, Resampling
from simrl.run.config import to_config_dict
from simrl.simulators.prompts import GUIDELINES
from simrl.training.loop import LoopSettings
from simrl.training.optimizer import OptimizerSettings
from simrl.training.preference import PreferenceSettings
from simrl.training.sft import SFTSettings

ASSISTANTS = {  # [paper]
    '1.5b': ModelSettings('Qwen/Qwen2.5-1.5B-Instruct'),
    '3b': ModelSettings('Qwen/Qwen2.5-3B-Instruct'),
    '7b': ModelSettings('Qwen/Qwen2.5-7B-Instruct'),
    # The template writes today's date; this one is its default where there is no clock [ours].
    'llama': ModelSettings('meta-llama/Llama-3.2-3B-Instruct', date='26 Jul 2024'),
}
HELD_OUT = ('sftuser2-14b',)  # of the matrix [paper]
LENGTHS = (2048, 4096, 8192, 16384)  # tokens of a row [ours], up to the context of [paper]


def role_play(
    model: ModelSettings, *, written: bool = False, guidelines: bool = False, text: bool = False
) -> PretrainedSimulator:
    """A prompted simulator, which knows the intent; `text`: of another tokenizer than the assistant's."""
    return PretrainedSimulator(
        'role_play',
        model,
        dtype='bfloat16',
        intent='required',
        opening='written' if written else 'given',
        guidelines=tuple(GUIDELINES) if guidelines else (),
        exchange='text' if text else 'tokens',
    )


def published(size: str, *, series: str = 'sftuser', text: bool = False) -> PretrainedSimulator:
    """A published simulator, fine-tuned on WildChat."""
    return PretrainedSimulator(
        'fine_tuned',
        ModelSettings(f'jjssuh/{series}-base-Qwen2.5-{size}-Instruct'),
        dtype='bfloat16',
        weights='load',
        intent='required',
        repeats=Resampling(tries=5, temperature_step=0.05, max_temperature=1.0),  # [paper]
        exchange='text' if text else 'tokens',
    )


def arms(text: bool) -> dict[str, PretrainedSimulator]:
    """The arms [paper]; `text`: the assistant has another tokenizer than Qwen2.5."""
    qwen = ModelSettings('Qwen/Qwen2.5-14B-Instruct')
    # Thinking off [paper]: an empty think block before each reply. The template drops it from history, 'keep' does not
    # [ours].
    qwen3 = {size: ModelSettings(f'Qwen/Qwen3-{size}', rewrites='keep') for size in ('14B', '32B')}
    return {
        'rpuser1': role_play(qwen, written=True, text=text),
        'rpuser2': role_play(qwen, text=text),
        'rpuser3': role_play(qwen, guidelines=True, text=text),
        'sftuser-7b': published('7B', text=text),
        'sftuser-14b': published('14B', text=text),
        'sftuser-32b': published('32B', text=text),
        'rpuser3-qwen3-14b': role_play(qwen3['14B'], guidelines=True, text=True),
        'rpuser3-qwen3-32b': role_play(qwen3['32B'], guidelines=True, text=True),
        # The paper has a simulator of WildChat-4.8M, which no assistant trains against; that it is this one is read off
        # its name [ours].
        'sftuser2-14b': published('14B', series='sftuser2', text=text),
    }


def judges() -> PanelSettings:
    """The two judges [paper], at temperature 0; their addresses are of this machine until flags say others."""
    return PanelSettings(
        {
            'mistral': EndpointSettings(
                url='http://localhost:8001/v1', model='mistralai/Mistral-Small-3.1-24B-Instruct-2503', in_flight=48
            ),
            'qwen': EndpointSettings(
                url='http://localhost:8002/v1',
                model='Qwen/Qwen3-32B',
                in_flight=48,
                extra='{"chat_template_kwargs": {"enable_thinking": false}}',
            ),
        },
        max_tokens=2048,  # [ours]; the paper has no limit
    )


def unused_reward_model(half: Half) -> RewardModelSettings:
    """For --config.reward.by=reward_model [ours]; the paper trains none."""
    optimizer = OptimizerSettings(1e-5, 'linear', warmup_steps=20, end_fraction=0.1)
    return RewardModelSettings(PreferenceSettings(1000, BatchSettings(64, LENGTHS[:2]), optimizer), half)


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: names of arms and at most one of ASSISTANTS, with commas between them."""
    names = [name for name in arg.split(',') if name]
    assistants = [name for name in names if name in ASSISTANTS] or ['3b']
    known = arms(text=assistants == ['llama'])
    chosen = [name for name in names if name not in ASSISTANTS] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f'paper.py: unknown arm {unknown[0]!r}, expected some of {", ".join([*known, *ASSISTANTS])}')
    if len(assistants) > 1:
        raise ValueError(f'paper.py: expected one assistant, found {" and ".join(assistants)}')
    execution = Execution('bfloat16', remat='full')
    return to_config_dict(
        PretrainedSettings(
            model=ASSISTANTS[assistants[0]],
            data=DataSettings(pathlib.Path('data'), on_bad_rows='drop'),
            user_sft=UserSFTSettings(  # of an arm with weights='fine_tune'
                SFTSettings(
                    2000,  # [ours]: the paper takes 2 epochs, whose steps depend on the data
                    BatchSettings(64, (4096,)),  # [paper]
                    # 2e-5 to 2e-6 with 10% of warm-up, no decay [paper]
                    OptimizerSettings(2e-5, 'cosine', warmup_steps=200, end_fraction=0.1),
                )
            ),
            reward=RewardSettings(by='panel', panel=judges()),
            held_out=JudgeSettings(by='panel', rubric='outside', panel=judges()),  # [ours]
            reward_model=unused_reward_model('first'),
            held_out_reward_model=unused_reward_model('second'),
            conversation=ConversationSettings(
                Limits(turns=5, prompt_tokens=2048, assistant_tokens=2048, user_tokens=1024),  # [paper]
                reserved_prompt_tokens=1024,  # [ours]: of prompts, for intents and guidelines
                without_intent='drop',
            ),
            scale=ReplySettings(),  # of a reward model
            arms={name: known[name] for name in chosen},
            held_out_simulators=tuple(name for name in HELD_OUT if name in chosen),
            seeds=(42,),  # [paper]; more of them make a claim about simulators
            rl=RLSettings(
                steps=100,  # [ours]: the paper does not say where its one epoch was stopped
                prompts_per_step=64,  # [paper]
                samples_per_prompt=5,  # [paper]
                row_buckets=LENGTHS,
                algorithm=AlgorithmSettings(
                    'grpo',  # [paper]
                    aggregation='token_mean',  # [paper]
                    kl='k3',  # [paper]
                    kl_coef=1e-3,  # [paper]
                    clip_low=0.2,  # [paper]
                    clip_high=0.2,  # [paper]
                    minibatches=4,  # [paper]
                    microbatches=10,  # [ours]
                ),
                optimizer=OptimizerSettings(8e-7, weight_decay=1e-2),  # [paper]; decay and clipping [trainer]
                # every [paper]; the paper validates on 10,000 conversations, more than it trains on in between, and
                # chooses by eye.
                validation=ValidationSettings(every=20, examples=1000),
            ),
            evaluation=EvaluationSettings(matrix=1000, batch_size=320, seed=42),  # [ours]
            compute=Compute(
                training=execution,
                sampling=execution,
                loop=LoopSettings(log_every=1, checkpoint_every=20, evaluate_every=100),  # [paper]
                rows_in_flight=320,
            ),
        )
    )
