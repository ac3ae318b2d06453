"""The course of a run: curves of training, and the seconds of its stages."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ValidationCurve:
    """A run's validation: the mean reward by validated step, and the step whose checkpoint is the result."""

    step: tuple[int, ...]
    reward: tuple[float | None, ...]
    chosen: int
    margin: float  # standard errors by which a later step must be better for an earlier one to be passed over
    judged: tuple[int, ...] | None = None  # conversations that the mean is over; None in results of an earlier version
    examples: int | None = None  # conversations held


@dataclasses.dataclass(frozen=True)
class TrainingCurve:
    """One run, by logged step; None where a step had nothing to measure."""

    step: tuple[int, ...]
    reward: tuple[float | None, ...]  # mean over the step's conversations, under the arm's own simulator
    end_signal: tuple[float | None, ...]  # share of conversations that the user ended
    kl: tuple[float | None, ...] | None = None  # to the initial assistant, nats per token
    zero_variance: tuple[float | None, ...] | None = None  # share of groups of equal rewards: no gradient
    validation: ValidationCurve | None = None
    # None, or none, in results of an earlier version.
    message_tokens: tuple[float | None, ...] | None = None  # mean tokens of the assistant's messages
    truncated: tuple[float | None, ...] | None = None  # share of them that reached max_new_tokens
    unjudged: tuple[float | None, ...] | None = None  # share of conversations without a reward
    ends: dict[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)  # shares by reason


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """training.json."""

    assistants: dict[str, TrainingCurve]


@dataclasses.dataclass(frozen=True)
class TimingsResult:
    """timings.json."""

    stages: dict[str, float]  # seconds of each stage's work
