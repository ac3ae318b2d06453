"""The whole experiment with SmolLM2-135M-Instruct on people's conversations.

    python -m simrl.main --config=configs/smollm2.py --config.data.folder=FOLDER

FOLDER holds conversations.jsonl.gz and preferences.jsonl.gz. The model comes from the Hugging Face hub, or from a file
or folder named by --config.model.source. Sized for one H100 and 20 minutes; `smollm2.py:cpu` for two cores and 25
minutes; `smollm2.py:smoke` runs the same stages on a tiny random model with this tokenizer.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.parts import algorithm, execution, lora, optimizer, optional, random_model, sampling
from simrl.simulators.role_play import INSTRUCTIONS

# What the three sizes differ in. A row is one conversation; a message's budget counts its end-of-turn.
SIZES: dict[str, dict[str, Any]] = {
    '': {
        'turns': 4,  # user messages with a reply
        'message_tokens': 160,
        'prompt_tokens': 384,
        'lengths': (256, 512, 1024),
        'sft_steps': 160,
        'sft_rows': 32,
        'pairs': 32,
        'reward_steps': 80,
        'held_out': None,
        'held_out_pairs': None,
        'rl_steps': 60,
        'prompts': 16,
        'samples': 8,
        'minibatches': 2,
        'microbatches': 4,
        'openings': None,
        'scale_openings': 256,
        'replies': 64,
        'dtype': 'bfloat16',
        'remat': 'full',
        'log_every': 5,
        'checkpoint_every': 20,
        'random': None,
    },
    'cpu': {
        'turns': 2,
        'message_tokens': 48,
        # Of the role-play prompt; the assistant's is 64 tokens shorter, so that its rows stay below 256. 18 of 1,305
        # training openings are too long, and none of 129 held-out ones.
        'prompt_tokens': 152,
        'lengths': (128, 256),
        'sft_steps': 20,
        'sft_rows': 4,
        'pairs': 4,
        'reward_steps': 14,
        'held_out': 24,
        'held_out_pairs': 48,
        'rl_steps': 4,
        'prompts': 4,
        'samples': 2,
        'minibatches': 1,
        'microbatches': 2,
        'openings': 24,
        'scale_openings': 24,
        'replies': 24,
        'dtype': 'float32',
        'remat': 'dots',
        'log_every': 1,
        'checkpoint_every': 10,
        'random': None,
    },
    'smoke': {
        'turns': 2,
        'message_tokens': 12,
        'prompt_tokens': 192,
        'lengths': (256,),
        'sft_steps': 3,
        'sft_rows': 4,
        'pairs': 4,
        'reward_steps': 3,
        'held_out': 8,
        'held_out_pairs': 16,
        'rl_steps': 2,
        'prompts': 4,
        'samples': 2,
        'minibatches': 1,
        'microbatches': 1,
        'openings': 16,
        'scale_openings': 16,
        'replies': 16,
        'dtype': 'float32',
        'remat': 'dots',
        'log_every': 1,
        'checkpoint_every': 1,
        'random': {
            'model_dim': 32,
            'num_layers': 2,
            'num_heads': 4,
            'num_kv_heads': 2,
            'mlp_dim': 64,
            'max_positions': 2048,  # tokens
            'tied_embedding': True,
            'seed': 0,
        },
    },
}


def fitting(steps: int, rows: int, lengths: tuple[int, ...], schedule: str, seed: int) -> ConfigDict:
    """Fine-tuning, or a reward model."""
    return ConfigDict(
        {
            'steps': steps,
            'batch': {
                'batch_size': rows,  # rows; of a reward model, pairs
                'lengths': lengths,  # tokens of a row, by bucket
                'seed': seed,  # of the order
            },
            'optimizer': optimizer(5e-5, schedule, warmup_steps=steps // 10, end_fraction=0.1),
        }
    )


def reward_model(size: dict[str, Any], half: str, seed: int) -> ConfigDict:
    """A reward model on one half of the pairs, split by their openings."""
    return ConfigDict(
        {
            'preference': fitting(size['reward_steps'], size['pairs'], size['lengths'], 'linear', seed),
            'half': half,  # of the training pairs: first, second or both
            'held_out': optional(int, size['held_out_pairs']),  # pairs; None: all of the test split
            'held_out_seed': 0,  # of their choice
        }
    )


def replies(size: dict[str, Any], openings: int | None, seed: int) -> ConfigDict:
    """Single replies to openings."""
    return ConfigDict(
        {
            'openings': optional(int, openings),  # None: all that fit
            'batch_size': size['replies'],  # replies at once
            'seed': seed,  # of the choice of openings, and of sampling
        }
    )


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: '' (one GPU), 'cpu' or 'smoke'."""
    if arg not in SIZES:
        raise ValueError(f'smollm2.py: unknown size {arg!r}, expected one of {", ".join(map(repr, SIZES))}')
    size = SIZES[arg]
    return ConfigDict(
        {
            'job': 'experiment',
            'model': {
                'source': 'HuggingFaceTB/SmolLM2-135M-Instruct',  # hub name, folder, or .gguf file
                'rewrites': 'error',  # what to do with a template that rewrites history: error, keep or omit
                'date': optional(str),  # today, for a template that writes it, such as '26 Jul 2024'
                'revision': optional(str),  # of a hub model; None: its main branch
                'random': random_model(size['random']),  # in place of the source's own weights
            },
            'data': {
                'folder': 'data',
                'conversations': 'conversations.jsonl.gz',  # in the folder
                'preferences': 'preferences.jsonl.gz',  # in the folder
                'on_bad_rows': 'drop',  # counted by reason; or raise
            },
            'user_sft': {
                'sft': {
                    **fitting(size['sft_steps'], size['sft_rows'], size['lengths'], 'cosine', seed=0),
                    'lora': lora(),
                },
                'role': 'user',  # whose turns are learnt: user or assistant
                'on_long': 'cut',  # to the whole messages that fit; or drop, both counted; or error
                'held_out': optional(int, size['held_out']),  # conversations; None: all of the test split
                'held_out_seed': 0,  # of their choice
            },
            'reward_model': reward_model(size, half='first', seed=0),  # gives the reward
            'judge': reward_model(size, half='second', seed=1),  # compares the assistants
            'talking': {
                'limits': {
                    'turns': size['turns'],  # user messages with a reply, the opening included
                    'prompt_tokens': size['prompt_tokens'],  # of the longest prompt in any view
                    'assistant_tokens': size['message_tokens'],  # of a message, its end-of-turn included
                    'user_tokens': size['message_tokens'],
                },
                'assistant': sampling(),  # temperature alone in training
                'role_play': {
                    'sampling': sampling(temperature=0.7, top_p=0.9),
                    'signal': '[END]',  # what it writes to end a conversation
                    'instructions': INSTRUCTIONS,  # with the fields {signal} and {opening}
                },
                'fine_tuned': {'sampling': sampling(temperature=0.7, top_p=0.9)},
            },
            'scale': replies(size, size['scale_openings'], seed=0),  # of the reward: the initial assistant's replies
            'arms': ('role_play', 'fine_tuned'),  # simulators to train against
            'seeds': (0,),  # training seeds of every arm
            'rl': {
                'steps': size['rl_steps'],
                'prompts_per_step': size['prompts'],
                'samples_per_prompt': size['samples'],  # conversations
                'row_buckets': size['lengths'],  # tokens that an update's rows are cut to
                'algorithm': algorithm('gae', minibatches=size['minibatches'], microbatches=size['microbatches']),
                'optimizer': optimizer(2e-6, 'constant', warmup_steps=0, end_fraction=0.1),
                'lora': lora(),
                'trained': 'assistant',  # or user, in a job of its own (rl.py)
            },
            'comparison': replies(size, size['openings'], seed=1),  # held-out openings for every assistant
            'compute': {
                'training': execution(size['dtype'], size['remat']),
                'sampling': execution(size['dtype'], size['remat']),
                'loop': {
                    'log_every': size['log_every'],  # steps
                    'checkpoint_every': size['checkpoint_every'],  # steps
                    'evaluate_every': size['sft_steps'],  # steps of fine-tuning
                    'keep_checkpoints': 1,  # latest ones
                    'max_nonfinite': 5,  # skipped updates in a row at which a run stops
                    'saved_conversations': 8,  # of each step's
                    'shown_conversations': 2,  # of each step's, as text in TensorBoard
                    'profile_step': 0,  # of a process: the step that is written to profile/; 0: none
                },
                'mesh': {  # devices
                    'data': optional(int),  # that rows are split over; None: all the rest
                    'model': 1,  # that heads, MLP and vocabulary are split over
                },
                'rows_in_flight': optional(int),  # conversations of an RL step held at once; None: all
                'xla_flags': (),  # of XLA's compiler, such as '--xla_gpu_autotune_level=2'
            },
        }
    )
