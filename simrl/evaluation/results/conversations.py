"""Conversations of a run, to be read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class ShownConversation:
    messages: tuple[Message, ...]
    score: float
    parts: dict[str, float]
    end: str


@dataclasses.dataclass(frozen=True)
class ShownExample:
    """The conversations of one example with every assistant, all from the same seed."""

    example: str
    intent: str | None
    traits: dict[str, float]
    conversations: dict[str, ShownConversation]


@dataclasses.dataclass(frozen=True)
class ConversationsResult:
    """conversations.json."""

    measures: dict[str, tuple[ShownExample, ...]]
