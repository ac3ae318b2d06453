"""A model as a function from chats to their next messages, wherever the model is.

On the device it is `rollouts.completion.complete`, at an endpoint `remote.client.complete`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from simrl.conversations.records import Message


class Failed(Protocol):
    """A message that could not be had; failures are counted by their cause."""

    @property
    def cause(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class NoText:
    """A message that could not be had, or not be used."""

    cause: str


# Chats, and an attempt's number from 0 -> the next message of each, in order, or why there is none. Another attempt
# draws other messages.
Complete = Callable[[Sequence[Sequence[Message]], int], Sequence[str | Failed]]
