"""A user model that takes direction: a name before the intent says what kind of person to play.

The concierge world's base user model has learnt what stereotypes of users say, each under its name. Asking it for one
of them is role-play; asking it for one drawn per example is role-play with personas (RPUser3 of arXiv:2605.09808, where
the draw is by the example's seed, so that all conversations of a group meet the same persona).
"""

from collections.abc import Callable

from simrl.rollouts.agents import System
from simrl.simulators.fine_tuned import told_intent


def directed(name: str, intent: str) -> str:
    """The system text that names a kind of person, and the intent."""
    return f'{name}: {intent}'


def one_name(name: str) -> System:
    """Every example is played by the same kind of person."""
    return lambda example: directed(name, told_intent(example))


def drawn_name(draw: Callable[[int], str]) -> System:
    """The kind of person is drawn by the example's `persona_seed`."""
    return lambda example: directed(draw(example.persona_seed), told_intent(example))
