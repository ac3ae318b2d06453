"""The settings of the update: which algorithm, and how much of each of its parts."""

import dataclasses
from typing import Literal, get_args

from simrl.rl import losses

Advantage = Literal['gae', 'grpo', 'dr_grpo', 'rloo', 'reinforce_pp']


@dataclasses.dataclass(frozen=True)
class AlgorithmSettings:
    """The algorithm. Fields marked (gae) are read with advantage 'gae' only."""

    advantage: Advantage = 'gae'  # see `advantages`
    aggregation: losses.Aggregation = 'token_mean'  # see `losses.aggregation_weights`
    aggregation_constant: float | None = None  # tokens; for `constant`, and only there
    kl: losses.KL = 'none'  # k1 is a penalty in the reward; k2 and k3 are terms of the loss; see `losses.kl_estimate`
    kl_coef: float = 0.0  # reward per nat (k1), or the weight of the term (k2, k3)
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    entropy_coef: float = 0.0  # weight of the entropy bonus, per nat
    value_coef: float = 0.5  # (gae) weight of the critic's loss
    value_clip: float | None = None  # (gae) how far a value may move from the old one, in units of reward; None: any
    value_stop_gradient: bool = False  # (gae) True: the critic's loss trains its head only, not the trunk
    gamma: float = 1.0  # (gae) discount per trained token
    lam: float = 0.95  # (gae) trace per trained token
    whiten: bool = True  # (gae) advantages of the batch to mean 0, variance 1
    epochs: int = 1  # passes over the batch
    minibatches: int = 1  # optimizer steps per epoch
    microbatches: int = 1  # pieces of a minibatch that are differentiated one after the other; changes no result
    critic_warmup_steps: int = 0  # (gae) first optimizer steps of the run in which only the value head learns

    def __post_init__(self) -> None:
        def check(field: str, fine: bool, expected: str) -> None:
            if not fine:
                raise ValueError(f'AlgorithmSettings.{field}: expected {expected}, found {getattr(self, field)!r}')

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
        if self.advantage != 'gae':
            expected = f'0 (advantage is {self.advantage!r}, which has no critic)'
            check('critic_warmup_steps', self.critic_warmup_steps == 0, expected)

    @property
    def updates_per_batch(self) -> int:
        return self.epochs * self.minibatches

    def rows_per_microbatch(self, rows: int) -> int:
        """Rows differentiated at once, of a batch of `rows`.

        Raises:
            ValueError: the batch cannot be cut evenly.
        """
        pieces = self.minibatches * self.microbatches
        if rows % pieces:
            raise ValueError(
                f'AlgorithmSettings.minibatches x microbatches: expected to divide the {rows} rows of a batch, '
                f'found {self.minibatches} x {self.microbatches} = {pieces}'
            )
        return rows // pieces
