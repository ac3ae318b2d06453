"""Settings of the RL algorithm."""

import dataclasses
import math
from typing import Literal, get_args

from simrl.rl import losses
from simrl.run.config import NO_EFFECT

Advantage = Literal['gae', 'grpo', 'dr_grpo', 'rloo', 'reinforce_pp']
GROUPED: tuple[Advantage, ...] = ('grpo', 'dr_grpo', 'rloo')  # compare the conversations of one prompt


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
    """Settings of the advantage, the losses and the optimizer steps of a batch."""

    advantage: Advantage = 'gae'  # advantage estimator, see `advantages`; 'gae' trains a critic (PPO)
    aggregation: losses.Aggregation = 'token_mean'  # weights of tokens in the loss, see `losses.aggregation_weights`
    aggregation_constant: float | None = None  # tokens; set only with aggregation 'constant'
    kl: losses.KL = 'none'  # KL to the reference: k1 in the reward, k2 and k3 in the loss; see `losses`
    kl_coef: float = 0.0  # weight of the KL: reward per nat (k1) or of the loss term (k2, k3)
    clip_low: float = 0.2  # lower clip range: ratios are clipped below 1 - clip_low
    clip_high: float = 0.2  # upper clip range: ratios are clipped above 1 + clip_high
    entropy_coef: float = 0.0  # weight of the entropy bonus per nat
    value_coef: float = 0.5  # gae only: weight of the critic's loss
    value_clip: float | None = None  # gae only: largest change of a value from the old one, in reward; None: no clip
    value_stop_gradient: bool = False  # gae only: True trains the value head alone with the critic's loss
    gamma: float = 1.0  # gae only: discount per trained token
    lam: float = 0.95  # gae only: trace per trained token
    whiten: bool = True  # gae only: normalise the batch's advantages to mean 0 and variance 1
    epochs: int = 1  # passes over each batch
    minibatches: int = 1  # optimizer steps per epoch, each on its own rows
    microbatches: int = dataclasses.field(default=1, metadata=NO_EFFECT)  # gradient accumulation steps per minibatch
    critic_warmup_steps: int = 0  # gae only: first optimizer steps of the run, which train only the value head

    def __post_init__(self) -> None:
        def check(field: str, fine: bool, expected: str) -> None:
            if not fine:
                raise ValueError(f'AlgorithmSettings.{field}: expected {expected}, found {getattr(self, field)!r}')

        for name, value in vars(self).items():
            check(name, not isinstance(value, float) or math.isfinite(value), 'a finite number')
        for field, kind in (('advantage', Advantage), ('aggregation', losses.Aggregation), ('kl', losses.KL)):
            check(field, getattr(self, field) in get_args(kind), f'one of {", ".join(get_args(kind))}')
        if self.aggregation == 'constant':
            fine = self.aggregation_constant is not None and self.aggregation_constant > 0
            check('aggregation_constant', fine, "a number of tokens above 0 (aggregation is 'constant')")
        else:
            check(
                'aggregation_constant', self.aggregation_constant is None, f'None (aggregation is {self.aggregation!r})'
            )
        if self.kl == 'none':
            check('kl_coef', self.kl_coef == 0, "0 (kl is 'none')")
        else:
            check('kl_coef', self.kl_coef > 0, f'a number above 0 (kl is {self.kl!r})')
        check('clip_low', 0 < self.clip_low <= 1, 'a number in (0, 1]')
        check('clip_high', self.clip_high > 0, 'a number above 0')
        check('entropy_coef', self.entropy_coef >= 0, 'at least 0')
        check('value_coef', self.value_coef >= 0, 'at least 0')
        check('value_clip', self.value_clip is None or self.value_clip > 0, 'None or a number above 0')
        check('gamma', 0 <= self.gamma <= 1, 'a number in [0, 1]')
        check('lam', 0 <= self.lam <= 1, 'a number in [0, 1]')
        for field in ('epochs', 'minibatches', 'microbatches'):
            check(field, getattr(self, field) >= 1, 'at least 1')
        check('critic_warmup_steps', self.critic_warmup_steps >= 0, 'at least 0')
        if self.critic_warmup_steps:
            check('value_coef', self.value_coef > 0, 'a number above 0 (critic_warmup_steps trains the critic alone)')
        if self.advantage != 'gae':
            expected = f'0 (advantage is {self.advantage!r}, which has no critic)'
            check('critic_warmup_steps', self.critic_warmup_steps == 0, expected)

    @property
    def updates_per_batch(self) -> int:
        return self.epochs * self.minibatches

    @property
    def reads_old(self) -> bool:
        """True if something reads the scores of the parameters before the update.

        With one update per batch the old log-probabilities are the stop-gradient of the new, without a pass of their
        own.
        """
        return self.updates_per_batch > 1 or self.advantage == 'gae' or self.kl == 'k1'

    def rows_per_microbatch(self, rows: int) -> int:
        """Number of rows per microbatch for a batch of `rows`.

        Raises:
            ValueError: the batch cannot be split evenly.
        """
        num_microbatches = self.minibatches * self.microbatches
        if rows % num_microbatches:
            raise ValueError(
                f'AlgorithmSettings.minibatches x microbatches: expected to divide the {rows} rows of a batch, '
                f'found {self.minibatches} x {self.microbatches} = {num_microbatches}'
            )
        return rows // num_microbatches
