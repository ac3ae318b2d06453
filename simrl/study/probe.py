"""An ordinary message to a model before anybody is let in: one that cannot read it would answer nobody.

A model trained from scratch, such as an assistant of the concierge world, has no tokens for most of what people write.
"""

import asyncio
import dataclasses

from simrl.conversations.records import Message
from simrl.study.turns import Ask, ModelError

PROBE_TOKENS = 16  # max tokens of an answer
PROBE_SECONDS = 60.0  # that it may take
ANSWERED = ('empty', 'length')  # kinds of errors of a model that read the message: a few tokens may have no text
ORDINARY = {  # what people write -> a text with it
    'small letters': 'please help me',
    'capital letters': 'Help ME',
    'digits': '250 words',
    'punctuation': 'it\'s "new"! (why?)',
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A model that did not answer an ordinary message. `is_final`: it refused the message, as it will again."""

    problem: str
    is_final: bool


async def unread(ask: Ask, model: str, title: str = '') -> Fault | None:
    """Sends a model an ordinary message; None: it answers.

    Where the model refuses the message, parts of it are sent alone, to find what it cannot read.

    Args:
        ask: for `PROBE_TOKENS`.
        title: of a task, in the language of the study.
    """
    texts = ORDINARY | ({'titles of tasks': title} if title else {})
    error = await _error_of(ask, model, ', '.join(texts.values()))
    if error is None or error.kind in ANSWERED:
        return None
    if error.kind != 'refused':
        return Fault(f'the model {model} did not answer an ordinary message: {error}', is_final=False)
    alone = {name: await _error_of(ask, model, text) for name, text in texts.items()}
    names = [name for name, found in alone.items() if found is not None and found.kind == 'refused']
    what = f'cannot read {", ".join(names)}' if len(names) < len(texts) else 'refuses all messages'
    return Fault(f'the model {model} {what}: {error}', is_final=True)


async def _error_of(ask: Ask, model: str, text: str) -> ModelError | None:
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await ask(model, [Message('user', text)])
    except ModelError as error:
        return error
    except TimeoutError:
        return ModelError(f'no answer in {PROBE_SECONDS:g} s', 'timeout')
    return None
