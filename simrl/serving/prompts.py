"""The prompt of a chat as tokens, as its template writes it."""

import contextlib
from collections.abc import Iterator, Sequence

from simrl.conversations.chat import Chat, EncodingError, Place
from simrl.conversations.records import Message


class MessagesError(ValueError):
    """Messages that the template cannot write; `field` names what is at fault, such as `messages.1.role`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f'{field}: {problem}')
        self.field, self.problem = field, problem


def chat_prompt(chat: Chat, messages: Sequence[Message]) -> tuple[int, ...]:
    """The prompt of the assistant's next message: the template's rendering of all messages, and the assistant's header.

    Special tokens in texts are plain text. Texts are encoded as they are, outer white space included; templates that
    strip it differ there.

    Args:
        messages: perhaps a system message first, then those of the user and the assistant. They alternate from the
            user's, unless the template ends all messages with special tokens: then they may come in any order. The last
            is the user's.

    Raises:
        MessagesError: another order, a system message for which the template has no place, or a character that the
            tokenizer has no token for.
    """
    system = messages[0].content if messages and messages[0].role == 'system' else None
    first = 0 if system is None else 1
    if len(messages) == first:
        raise MessagesError('messages', "expected a user's message, found none")
    if messages[-1].role != 'user':
        last = messages[-1].role
        raise MessagesError(
            f'messages.{len(messages) - 1}.role', f"expected 'user' for the last message, found {last!r}"
        )
    any_order = chat.ends('user') and not (first and chat.headers_after_system)
    with _naming('messages.0.content'):
        tokens = list(chat.system_prefix(system))
    for number, message in enumerate(messages[first:], start=first):
        role = message.role
        if role == 'system':
            raise MessagesError(f'messages.{number}.role', "expected 'user' or 'assistant' here, found 'system'")
        expected = ('user', 'assistant')[(number - first) % 2]
        if role != expected and not any_order:
            problem = f"expected {expected!r}, since this model's template alternates, found {role!r}"
            raise MessagesError(f'messages.{number}.role', problem)
        tokens += chat.first_header(role, system) if number == first else chat.header(role)
        place: Place = 'first' if number == first and system is not None and role == 'user' else role
        with _naming(f'messages.{number}.content'):
            tokens += chat.encode(message.content, place)
        tokens.append(chat.end_of_turn[role])
    return (*tokens, *chat.header('assistant'))


@contextlib.contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except EncodingError as error:
        raise MessagesError(field, f'expected text that the model can read, found another: {error.reason}') from None
    except ValueError as error:  # no place for a system message
        raise MessagesError(field, str(error)) from None
