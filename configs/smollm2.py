"""The whole experiment with SmolLM2-135M-Instruct on people's conversations.

    python -m simrl.main --config=configs/smollm2.py --config.data.folder=FOLDER

FOLDER holds conversations.jsonl.gz and preferences.jsonl.gz. The model comes from the Hugging Face hub, or from a file
or folder named by --config.model.source. Sized for one H100 and 20 minutes; `smollm2.py:cpu` for two cores and 25
minutes; `smollm2.py:smoke` runs the same stages on a tiny random model with this tokenizer.
"""

from ml_collections import ConfigDict

# What the three sizes differ in. A row is one conversation; a message's budget counts its end-of-turn.
SIZES = {
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
        'prompt_tokens': 192,
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
        'remat': 'none',
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
        'remat': 'none',
        'log_every': 1,
        'checkpoint_every': 1,
        'random': {
            'model_dim': 32,
            'num_layers': 2,
            'num_heads': 4,
            'num_kv_heads': 2,
            'mlp_dim': 64,
            'max_positions': 2048,  # tokens
            'seed': 0,
        },
    },
}


def optimizer(learning_rate: float, schedule: str, warmup_steps: int) -> ConfigDict:
    """AdamW; the learning rate is its highest."""
    return ConfigDict(
        {
            'learning_rate': learning_rate,
            'schedule': schedule,
            'warmup_steps': warmup_steps,
            'end_fraction': 0.1,  # of the highest rate, at the last step
            'b1': 0.9,
            'b2': 0.999,
            'weight_decay': 0.0,
            'clip_norm': 1.0,  # global norm of a gradient
        }
    )


def reward_model(size: dict, half: str, seed: int) -> ConfigDict:
    """A reward model on one half of the pairs, split by their openings."""
    return ConfigDict(
        {
            'preference': {
                'steps': size['reward_steps'],
                'batch': {'batch_size': size['pairs'], 'lengths': size['lengths'], 'seed': seed},  # pairs; tokens
                'optimizer': optimizer(5e-5, 'linear', size['reward_steps'] // 10),
            },
            'half': half,
            'held_out': size['held_out_pairs'],  # pairs; None: all of the test split
            'held_out_seed': 0,
        }
    )


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: '' (one GPU), 'cpu' or 'smoke'."""
    if arg not in SIZES:
        raise ValueError(f'smollm2.py: unknown size {arg!r}, expected one of {", ".join(map(repr, SIZES))}')
    size = SIZES[arg]
    execution = {
        'dtype': size['dtype'],  # of activations and matrix products; parameters are float32
        'remat': size['remat'],  # what the backward pass recomputes
        'attention': 'xla',
        'log_prob_chunk': 128,  # time steps whose logits exist at once
    }
    return ConfigDict(
        {
            'job': 'experiment',
            'model': {
                'source': 'HuggingFaceTB/SmolLM2-135M-Instruct',  # hub name, folder, or .gguf file
                'random': size['random'],  # None: the source's own weights
            },
            'data': {
                'folder': 'data',
                'conversations': 'conversations.jsonl.gz',
                'preferences': 'preferences.jsonl.gz',
                'on_bad_rows': 'drop',  # counted by reason
            },
            'user_sft': {
                'sft': {
                    'steps': size['sft_steps'],
                    'batch': {'batch_size': size['sft_rows'], 'lengths': size['lengths'], 'seed': 0},  # rows; tokens
                    'optimizer': optimizer(5e-5, 'cosine', size['sft_steps'] // 10),
                },
                'role': 'user',  # whose turns are learnt
                'on_long': 'cut',  # to the whole messages that fit; counted
                'held_out': size['held_out'],  # conversations; None: all of the test split
                'held_out_seed': 0,
            },
            'reward_model': reward_model(size, half='first', seed=0),  # gives the reward
            'judge': reward_model(size, half='second', seed=1),  # compares the assistants
            'talking': {
                'limits': {
                    'turns': size['turns'],  # user messages with a reply, the opening included
                    'prompt_tokens': size['prompt_tokens'],  # of the longest prompt in any view
                    'assistant_tokens': size['message_tokens'],
                    'user_tokens': size['message_tokens'],
                },
                'assistant': {'temperature': 1.0},
                'role_play': {'sampling': {'temperature': 0.7, 'top_p': 0.9}, 'signal': '[END]'},
                'fine_tuned': {'sampling': {'temperature': 0.7, 'top_p': 0.9}},
            },
            'scale': {'openings': size['scale_openings'], 'batch_size': size['replies'], 'seed': 0},
            'arms': ('role_play', 'fine_tuned'),
            'seeds': (0,),
            'rl': {
                'steps': size['rl_steps'],
                'prompts_per_step': size['prompts'],
                'samples_per_prompt': size['samples'],
                'row_buckets': size['lengths'],  # tokens
                'algorithm': {
                    'estimator': 'gae',
                    'aggregation': 'token_mean',
                    'kl': 'k3',
                    'kl_coef': 0.01,
                    'clip_low': 0.2,
                    'clip_high': 0.2,
                    'value_coef': 0.5,
                    'gamma': 1.0,
                    'lam': 0.95,
                    'whiten': True,
                    'epochs': 1,
                    'minibatches': size['minibatches'],
                    'microbatches': size['microbatches'],
                },
                'optimizer': optimizer(2e-6, 'constant', 0),
                'trained': 'assistant',
            },
            'comparison': {'openings': size['openings'], 'batch_size': size['replies'], 'seed': 1},
            'computing': {
                'training': execution,
                'sampling': execution,
                'loop': {
                    'log_every': size['log_every'],  # steps
                    'checkpoint_every': size['checkpoint_every'],  # steps
                    'evaluate_every': size['sft_steps'],  # steps of fine-tuning
                    'keep_checkpoints': 1,
                    'max_nonfinite': 5,  # skipped updates in a row at which a run stops
                    'saved_conversations': 8,  # of each step's
                    'shown_conversations': 2,  # of each step's, as text in TensorBoard
                },
                'mesh': {'data': None, 'model': 1},  # devices; None: all the rest
            },
        }
    )
