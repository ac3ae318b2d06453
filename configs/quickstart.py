"""The whole experiment in the concierge world, where the truth about people is known. No downloads.

    python -m simrl.main --config=configs/quickstart.py

Sized for a laptop and minutes. `quickstart.py:ppo` and `quickstart.py:grpo` name the algorithm; without an argument it
is grpo, which is there sooner: training against people themselves, the mean satisfaction of four steps passed .70 by
step 12 with both seeds, and with ppo by steps 16 and 20. `quickstart.py:smoke` runs the same stages, too small to learn
much, in 90 seconds.
"""

from ml_collections import ConfigDict

from configs.parts import algorithm, execution, lora, optimizer, optional

ESTIMATORS = {'ppo': 'gae', 'grpo': 'grpo'}  # of the algorithms by their names
DEFAULT = 'grpo'

# With models as small as these XLA takes longer to compile on a CPU than to compute. The first flag halves what it
# takes to compile a message, and makes a step of training about a tenth slower; the second spares what one core cannot
# share. XLA does not start with a flag that it no longer knows: --config.compute.xla_flags='()' goes without.
QUICKLY_COMPILED = ('--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1')


def fitting(steps: int, batch_size: int, seed: int) -> ConfigDict:
    """Maximum likelihood on one role's turns."""
    return ConfigDict(
        {
            'steps': steps,
            'batch': {
                'batch_size': batch_size,  # rows
                'lengths': (40, 56, 72, 96, 128),  # tokens of a row, by bucket
                'seed': seed,  # of the order
            },
            'optimizer': optimizer(3e-3, 'cosine', warmup_steps=min(30, steps // 3), end_fraction=0.05),
            'lora': lora(),
        }
    )


def model(model_dim: int, num_layers: int, seed: int) -> ConfigDict:
    """A decoder of random weights."""
    return ConfigDict(
        {
            'model_dim': model_dim,
            'num_layers': num_layers,
            'num_heads': model_dim // 16,
            'num_kv_heads': model_dim // 16,
            'mlp_dim': 3 * model_dim,
            'max_positions': 512,  # tokens
            'tied_embedding': False,  # the output has a matrix of its own
            'seed': seed,
        }
    )


def user_model(model_dim: int, num_layers: int, base_steps: int, fine_tuning_steps: int, batch_size: int) -> ConfigDict:
    """A user model of one size: first of stereotypes, then fine-tuned on people."""
    return ConfigDict(
        {
            'model': model(model_dim, num_layers, seed=1),
            'base': fitting(base_steps, batch_size, seed=1),
            'fine_tuning': fitting(fine_tuning_steps, batch_size, seed=2),  # each training seed adds its own
        }
    )


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: '' (as grpo), 'ppo', 'grpo' or 'smoke'."""
    if arg not in ('', 'smoke', *ESTIMATORS):
        raise ValueError(f"quickstart.py: unknown argument {arg!r}, expected '', 'ppo', 'grpo' or 'smoke'")
    smoke = arg == 'smoke'
    return ConfigDict(
        {
            'job': 'known_answer',
            'world': {
                'seed': 0,  # of people and scripted text
                'dial': 1.0,  # 0: people are the stereotype that role-play knows; 1: people as the world describes them
            },
            'corpora': {  # conversations, but for the vocabulary
                'vocabulary': 383,  # ids of the tokenizer; with the terminal token a multiple of 128
                'assistant': 600 if smoke else 16000,
                'base_user': 600 if smoke else 12000,
                'logs': 256 if smoke else 8000,
                'held_out': 64 if smoke else 512,
            },
            'assistant': {
                'model': model(64, 2, seed=0) if not smoke else model(32, 1, seed=0),
                'sft': fitting(12 if smoke else 800, 32, seed=0),
            },
            'users': {  # by size; an arm without a size has the medium one
                'medium': user_model(32, 1, 12, 8, 64) if smoke else user_model(64, 2, 1000, 700, 32),
            },
            'limits': {
                'turns': 5,  # user messages with a reply
                'prompt_tokens': 16,  # of the longest prompt in any view
                'assistant_tokens': 12,  # of a message, its end-of-turn included
                'user_tokens': 20,
            },
            'arms': ('role_play', 'persona', 'fine_tuned', 'oracle'),
            'seeds': (0,) if smoke else (0, 1),  # training seeds, the same for every arm
            'rl': {
                'steps': 3 if smoke else 24,
                'prompts_per_step': 8 if smoke else 32,
                'samples_per_prompt': 4 if smoke else 8,
                'row_buckets': (48, 64, 80, 96, 128, 200),  # tokens
                'algorithm': algorithm(ESTIMATORS.get(arg, ESTIMATORS[DEFAULT]), minibatches=2, microbatches=1),
                'optimizer': optimizer(1e-3, 'constant', warmup_steps=0, end_fraction=0.05),
                'lora': lora(),
                'trained': 'assistant',
            },
            'rl_people': 64 if smoke else 4096,  # people, or their intents, that RL starts conversations from
            'evaluation': {
                'people': 64 if smoke else 2000,  # new ones, the same for every assistant
                'block': 64 if smoke else 1000,  # of these in a stage: more people are more stages
                'matrix': 32 if smoke else 512,  # conversations of each simulator with each assistant
                'batch_size': 32 if smoke else 250,  # conversations at once
                'shown': 2 if smoke else 4,  # people whose conversations the report shows
                'seed': 0,
            },
            'compute': {
                'training': execution('float32', 'none', log_prob_chunk=2048),
                'sampling': execution('float32', 'none'),
                'loop': {
                    'log_every': 1,  # steps
                    'checkpoint_every': 2 if smoke else 20,  # steps
                    'evaluate_every': 0,  # steps of fine-tuning; 0: only before and after
                    'keep_checkpoints': 1,
                    'max_nonfinite': 5,  # skipped updates in a row at which a run stops
                    'saved_conversations': 4,  # of each step's
                    'shown_conversations': 1,  # of each step's, as text in TensorBoard
                    'profile_step': 0,  # of a process: the step that is written to profile/; 0: none
                },
                'mesh': {  # devices
                    'data': optional(int, 1),  # that rows are split over
                    'model': 1,  # that heads, MLP and vocabulary are split over
                },
                'rows_in_flight': optional(int),  # conversations of an RL step held at once; None: all
                'xla_flags': () if smoke else QUICKLY_COMPILED,  # of XLA's compiler
            },
            'workers': optional(int),  # stages side by side; None: one for each core, at most 8
        }
    )
