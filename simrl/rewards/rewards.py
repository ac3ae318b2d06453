"""What a conversation was worth."""

import flax.struct
import jax


@flax.struct.dataclass
class Rewards:
    """The reward of each of B conversations, and why where there is none.

    Attributes:
        value: float32 `[B]`, or `[B, turns]` for one reward per assistant turn; 0 where not valid.
        valid: bool, the shape of `value`. A conversation that could not be judged is masked, never scored 0.
        parts: what `value` was made of, by name, each float32 of the shape of `value`; for logging.
        cause: int32 `[B]`, 0 where valid, else an index into the judge's own list of causes.
    """

    value: jax.Array
    valid: jax.Array
    parts: dict[str, jax.Array]
    cause: jax.Array
