"""Parts that several configs are made of, each with all of its fields. No config itself.

Every field of a config is written out, also where it has its usual value, so that a flag can set it. A flag sets a
field to a value of its type: what may also be None is a placeholder for that type.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict


def optional(kind: type, value: Any = None) -> Any:
    """A field that may be None."""
    return config_dict.placeholder(kind) if value is None else value


def optimizer(learning_rate: float, schedule: str, *, warmup_steps: int, end_fraction: float) -> ConfigDict:
    """AdamW."""
    return ConfigDict(
        {
            'learning_rate': learning_rate,  # at its highest
            'schedule': schedule,  # after the warm-up: constant, cosine or linear
            'warmup_steps': warmup_steps,  # steps in which the rate rises
            'end_fraction': end_fraction,  # of the highest rate, at the last step (cosine, linear)
            'b1': 0.9,  # decay of the mean gradient, per step
            'b2': 0.999,  # of the mean squared gradient
            'epsilon': 1e-8,  # added to its root
            'weight_decay': 0.0,  # per step, times the learning rate; of matrices and embeddings
            'clip_norm': 1.0,  # largest global norm of a gradient
        }
    )


def sampling(temperature: float = 1.0, top_p: float = 1.0) -> ConfigDict:
    """How a model is sampled."""
    return ConfigDict(
        {
            'temperature': temperature,  # 0: greedy
            'top_k': 0,  # most probable tokens that are kept; 0: all
            'top_p': top_p,  # probability that is kept, the most probable tokens first
            'min_p': 0.0,  # least probability that is kept, as a share of the most probable token's
        }
    )


def lora() -> ConfigDict:
    """Adapters; all of its fields are None, which stands for none: every weight is trained."""
    return ConfigDict(
        {
            'rank': optional(int),  # of what an adapter adds: the inner dimension of its two factors
            'alpha': optional(float),  # what the adapters add is multiplied by alpha / rank
            'targets': optional(tuple),  # weights that have one: query, key, value, output, gate, up, down
        }
    )


def algorithm(advantage: str, *, minibatches: int, microbatches: int) -> ConfigDict:
    """The update. Fields marked (gae) are read with gae only, which is PPO."""
    return ConfigDict(
        {
            'advantage': advantage,  # gae, grpo, dr_grpo, rloo or reinforce_pp
            'aggregation': 'token_mean',  # or seq_mean_token_mean, constant
            'aggregation_constant': optional(float),  # tokens that a loss is divided by (constant)
            'kl': 'k3',  # of the loss: k2 or k3; in the reward: k1; or none
            'kl_coef': 0.01,  # weight of the term; k1: reward per nat
            'clip_low': 0.2,  # a ratio is clipped below 1 less this
            'clip_high': 0.2,  # and above 1 plus this
            'entropy_coef': 0.0,  # weight of the entropy bonus, per nat
            'value_coef': 0.5,  # (gae) weight of the critic's loss
            'value_clip': optional(float),  # (gae) how far a value may move, in units of reward; None: any
            'value_stop_gradient': False,  # (gae) the critic's loss trains its head only
            'gamma': 1.0,  # (gae) discount per trained token
            'lam': 0.95,  # (gae) trace per trained token
            'whiten': True,  # (gae) advantages of a batch to mean 0 and variance 1
            'epochs': 1,  # passes over a batch
            'minibatches': minibatches,  # optimizer steps of a pass
            'microbatches': microbatches,  # pieces of a minibatch, one after the other; changes no result
            'critic_warmup_steps': 0,  # (gae) first optimizer steps, in which only the value head learns
        }
    )


def execution(dtype: str, remat: str, log_prob_chunk: int = 512) -> ConfigDict:
    """How a decoder is computed."""
    return ConfigDict(
        {
            'dtype': dtype,  # of activations and matrix products, float32 or bfloat16; parameters are float32
            'remat': remat,  # what the backward pass recomputes: none, dots or full
            'attention': 'xla',  # or cudnn, on a GPU in bfloat16
            'log_prob_chunk': log_prob_chunk,  # trained positions whose logits exist at once
        }
    )


def random_model(sizes: dict[str, int | bool] | None) -> ConfigDict:
    """A decoder of random weights; None: all of its fields are None, which stands for no such model."""
    sizes = sizes or {}
    return ConfigDict(
        {
            'model_dim': optional(int, sizes.get('model_dim')),
            'num_layers': optional(int, sizes.get('num_layers')),
            'num_heads': optional(int, sizes.get('num_heads')),
            'num_kv_heads': optional(int, sizes.get('num_kv_heads')),
            'mlp_dim': optional(int, sizes.get('mlp_dim')),
            'max_positions': optional(int, sizes.get('max_positions')),  # tokens
            'tied_embedding': optional(bool, sizes.get('tied_embedding')),  # the output shares the input's matrix
            'seed': optional(int, sizes.get('seed')),
        }
    )
