"""A message of a participant -> both replies, or why there are none.

1. A moderation, if there is one, sees the message first. Where it cannot be asked no model is, either.
2. Both models are asked at once, with the same conversation and no word of the task.
3. Both answers make a turn; one alone, or an empty one, makes none.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from absl import logging

from simrl.conversations.records import Message
from simrl.study.assignment import first_is_left
from simrl.study.events import Replied, Session, Side, Voided
from simrl.study.names import names_itself
from simrl.study.participant import Participant
from simrl.study.settings import StudyModel

REFUSED = 'refused by moderation'


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's reply. `seconds`: that it took; `cut`: at its max number of tokens."""

    text: str
    seconds: float
    cut: bool


class ModelError(RuntimeError):
    """A model, or the moderation, that did not answer. `kind`: of the cause, without a word of which model it was."""

    def __init__(self, cause: str, kind: str = 'no answer') -> None:
        super().__init__(cause)
        self.kind = kind


Ask = Callable[[str, Sequence[Message]], Awaitable[Answer]]  # name of a model, the conversation; raises ModelError
Moderate = Callable[[str], Awaitable[str | None]]  # a message -> why it is refused, or None; raises ModelError


async def reply(
    state: Participant, key: bytes, ask: Ask, moderate: Moderate | None, names: Collection[str] = ()
) -> Replied | Voided:
    """The replies to the message that waits for them, each on its side; or a void turn with its cause.

    Args:
        key: of draws, see `assignment`.
        names: of all models; a reply in which one is found is flagged.
    """
    talk, turn = state.talk, state.turn
    assert talk is not None
    assert turn is not None
    session: Session = 'training' if state.step == 'training' else 'main'
    first_left = first_is_left(key, state.id, session, len(talk.turns) - 1)
    left, right = talk.pair if first_left else talk.pair[::-1]
    try:
        if moderate is not None and (refusal := await moderate(turn.message)) is not None:
            return Voided(f'moderation: {refusal}', refused=True, kind=REFUSED)
        conversation = [Message(role, text) for role, text in talk.messages()]
        answers = await _both(_answer(ask, left, conversation), _answer(ask, right, conversation))
    except ModelError as error:
        logging.warning('a turn of %s is void: %s', state.id, error)
        return Voided(str(error), kind=error.kind)
    except Exception as error:  # a fault of ours: the participant would wait for ever
        logging.exception('a turn of %s is void', state.id)
        return Voided(f'{type(error).__name__}: {error}', kind='fault of this program')
    sides: tuple[Side, ...] = ('left', 'right')
    return Replied(
        left=left,
        right=right,
        left_text=answers[0].text,
        right_text=answers[1].text,
        left_seconds=answers[0].seconds,
        right_seconds=answers[1].seconds,
        left_cut=answers[0].cut,
        right_cut=answers[1].cut,
        named=tuple(side for side, answer in zip(sides, answers, strict=True) if names_itself(answer.text, names)),
    )


def names_of(models: Mapping[str, StudyModel]) -> frozenset[str]:
    """Names by which a reply could tell which model wrote it: that of the config, and that of its server or file."""
    found = {*models}
    for model in models.values():
        name = model.source if model.endpoint is None else model.endpoint.model
        found |= {name, name.rstrip('/').rpartition('/')[2]}
    return frozenset(found)


async def _answer(ask: Ask, model: str, conversation: Sequence[Message]) -> Answer:
    try:
        answer = await ask(model, conversation)
    except ModelError as error:
        raise ModelError(f'{model}: {error}', error.kind) from error
    if not answer.text.strip():
        raise ModelError(f'{model}: expected a reply, found an empty one', 'empty reply')
    return answer


async def _both(left: Awaitable[Answer], right: Awaitable[Answer]) -> list[Answer]:
    """Both answers; the failure of one ends the other."""
    tasks = [asyncio.ensure_future(left), asyncio.ensure_future(right)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
