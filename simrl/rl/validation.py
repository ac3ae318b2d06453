"""Validation of a policy in training, and the rule that chooses the checkpoint which a run leaves.

arXiv:2605.09808 takes the checkpoint at the onset of the plateau of the validation reward, by eye. `plateau_onset` is
that rule as code, so that no arm is stopped at a better moment than another.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.conversations.records import Example
from simrl.models.transformer import Params
from simrl.rewards.rewards import Rewards, Score
from simrl.rl.judged import judged_batches, print_causes
from simrl.rollouts.agents import Agent, Limits
from simrl.rollouts.schedule import Batching

VALIDATION_STEP = 2**31 - 5  # in the keys of conversations, far above the steps of training: no two uses draw the same


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """Conversations between steps of training, from examples that training does not start from."""

    every: int  # steps between validations; also before the first step and after the last
    examples: int  # conversations of a validation, one for each of so many examples, the same every time
    margin: float = 1.0  # standard errors by which a later step must be better for an earlier one to be passed over

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f'ValidationSettings.every: expected at least 1, found {self.every}')
        if self.examples < 2:
            raise ValueError(f'ValidationSettings.examples: expected at least 2, found {self.examples}')
        if not 0 <= self.margin < np.inf:
            raise ValueError(f'ValidationSettings.margin: expected a number of at least 0, found {self.margin}')


@dataclasses.dataclass(frozen=True)
class Validation:
    """A training's validation.

    Attributes:
        settings: when.
        examples: what its conversations start from; their prompts must fit.
        score: as that of training, for conversations from these examples.
        record: takes (steps done, rewards `[examples]`, trained parameters) of each validation; a reward is NaN where a
            conversation has none.
    """

    settings: ValidationSettings
    examples: Sequence[Example]
    score: Score
    record: Callable[[int, np.ndarray, Params], None]


def validation_rewards(
    user: Agent,
    assistant: Agent,
    validation: Validation,
    *,
    name: str,
    max_unjudged: float,
    chat: Chat,
    limits: Limits,
    seed: int,
    view: int,
    mesh: Mesh,
    batch_size: int,
    rows_in_flight: int | None,
    batching: Batching,
) -> np.ndarray:
    """Rewards of one conversation from each example, float32 `[examples]`; NaN where there is none.

    Arguments as of `collect`. Every validation of a training draws the same random numbers.

    Args:
        name: of this validation, in errors.
        max_unjudged: of `LoopSettings`.
        batch_size: conversations at once, those of a step of training, whose programs are compiled already.

    Raises:
        ConversationError: too many conversations have no reward: they would choose the checkpoint.
    """
    values: list[np.ndarray] = []
    causes: list[str] = []
    for chosen, found, without in judged_batches(
        user,
        assistant,
        validation.examples,
        validation.score,
        chat=chat,
        limits=limits,
        seed=seed,
        step=VALIDATION_STEP,
        view=view,
        mesh=mesh,
        batch_size=batch_size,
        rows_in_flight=rows_in_flight,
        batching=batching,
        name=name,
        max_unjudged=max_unjudged,
    ):
        values.append(mean_of_turns(found.rewards)[: len(chosen)])
        causes.extend(without.values())
    print_causes(name, causes)
    return np.concatenate(values)


def mean_of_turns(rewards: Rewards) -> np.ndarray:
    """The reward of each conversation, in the mean over its turns where they have one each."""
    valid = np.asarray(rewards.valid).reshape(len(rewards.valid), -1)
    value = np.where(valid, np.asarray(rewards.value).reshape(valid.shape), 0.0)
    count = np.sum(valid, axis=1)
    return np.where(count > 0, np.sum(value, axis=1) / np.maximum(count, 1), np.nan).astype(np.float32)


def beats(later: np.ndarray, earlier: np.ndarray, margin: float) -> bool:
    """True if a step's rewards are higher than an earlier one's by more than `margin` standard errors.

    The error is that of the mean difference over examples: both steps talk from the same ones, with the same random
    numbers, so that most of what makes examples differ cancels.

    Args:
        later, earlier: float `[examples]`, in the same order; NaN where a conversation has no reward.

    Returns:
        False too where fewer than two examples have a reward after both steps, which is printed.
    """
    difference = later - earlier
    difference = difference[np.isfinite(difference)]
    if len(difference) < 2:
        print(
            f'validation: {len(difference)} of {len(later)} examples have a reward after both of two steps: the later '
            'one does not count as better',
            flush=True,
        )
        return False
    error = np.std(difference, ddof=1) / np.sqrt(len(difference))
    return bool(np.mean(difference) > margin * error)


def plateau_onset(rewards: Mapping[int, np.ndarray], margin: float) -> int:
    """The first validated step that no later one beats: from there on, the reward rises no more.

    A step that a later one beats stays beaten whatever comes after, so that its checkpoint may be deleted at once. The
    margin is a one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3) for
    paired rewards.

    Args:
        rewards: by step, float `[examples]`; see `beats`.

    Raises:
        ValueError: there is no step.
    """
    if not rewards:
        raise ValueError('plateau_onset: expected at least one validated step, found none')
    return unbeaten(rewards, margin)[0]


def unbeaten(rewards: Mapping[int, np.ndarray], margin: float) -> list[int]:
    """The validated steps that no later one beats, in order: one of them is, or will be, the onset of the plateau."""
    steps = sorted(rewards)
    return [
        step
        for step in steps
        if not any(beats(rewards[later], rewards[step], margin) for later in steps if later > step)
    ]
