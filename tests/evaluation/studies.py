"""Made-up user studies: people with preferences of their own vote between two assistants, in positions drawn anew."""

import dataclasses

import numpy as np
from scipy.special import expit


@dataclasses.dataclass(frozen=True)
class Study:
    """Votes of one study, [votes]."""

    preferences: np.ndarray
    people: np.ndarray
    a_first: np.ndarray


def study(random, *, people, preference=0.3, position=0.4, tie=0.5, sd=1.2, votes=(5, 9), more_if_keen=False) -> Study:
    """A study of the cumulative-logit model; with `more_if_keen` people who prefer the first assistant vote more."""
    own = sd * random.normal(size=people)
    number = random.integers(*votes, people) + (4 * (own > 0) if more_if_keen else 0)
    who = np.repeat(np.arange(people), number)
    first = random.random(len(who)) < 0.5
    latent = preference + position * (first - 0.5) + own[who] + random.logistic(size=len(who))
    return Study((np.sign(latent - tie) + np.sign(latent + tie) + 2) / 4, who, first)


def true_win_rate(*, preference=0.3, position=0.4, tie=0.5, sd=1.2) -> float:
    """The mean over people of the probability that they prefer the first assistant, ties one half."""
    own = sd * np.linspace(-8, 8, 4001)
    density = np.exp(-np.square(np.linspace(-8, 8, 4001)) / 2)
    at = preference + own + position * np.array([[0.5], [-0.5]])
    chosen = (expit(at - tie) + expit(at + tie)) / 2
    return float((chosen.mean(0) * density).sum() / density.sum())
