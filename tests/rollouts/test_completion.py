"""Replies of a model on the device to single prompts."""

import jax
import pytest

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.completion import NoText
from simrl.conversations.records import Message
from simrl.models import sharding
from simrl.rollouts.completion import Sampled, complete
from simrl.rollouts.completion import replies as sampled
from tests.serving.test_stream import CHAT, agent

MESH = sharding.make_mesh(1, 1, jax.devices()[:1])
PROMPTS = ['Hi!', 'bb', 'Hi!', 'x' * 80, '\ud800', *(letter * 3 for letter in 'abcdefghijklmnopqrst')]


def replies(prompts: list[str], batch_size: int = 8, seed: int = 5, attempt: int = 0):
    function = complete(agent(ASSISTANT), CHAT, prompt_tokens=40, batch_size=batch_size, mesh=MESH, seed=seed)
    return function([(Message('user', prompt),) for prompt in prompts], attempt)


def test_a_reply_depends_on_its_prompt_alone() -> None:
    found = replies(PROMPTS)
    assert found[0] == found[2]
    assert found[3:5] == [NoText('prompt too long'), NoText('prompt not encodable')]
    others = found[:3] + found[5:]
    assert len(set(others)) > 8
    assert NoText('length') in others
    assert all(isinstance(reply, str) or reply == NoText('length') for reply in others)
    assert replies(PROMPTS[::-1]) == found[::-1]
    assert replies(PROMPTS[3:5]) == found[3:5]
    assert replies(PROMPTS, seed=6) != found
    assert replies(PROMPTS, attempt=1) != found


def test_only_chats_that_alternate_from_user_to_user_are_taken() -> None:
    function = complete(agent(ASSISTANT), CHAT, prompt_tokens=40, batch_size=8, mesh=MESH)
    for roles in (('system', 'user'), ('user', 'assistant'), ('user', 'user', 'user'), ()):
        with pytest.raises(ValueError, match=r'expected chats that alternate from user to user, found \['):
            function([[Message(role, 'a') for role in roles]], 0)


def test_a_reply_depends_on_the_whole_chat() -> None:
    """Other chats beside it change nothing."""

    def chat_of(*texts: str) -> list[Message]:
        return [Message(('user', 'assistant')[i % 2], text) for i, text in enumerate(texts)]

    chats = [chat_of('Hi!'), chat_of('a', 'b', 'Hi!'), chat_of('a', 'c', 'Hi!'), chat_of('x' * 20, 'y' * 20, 'Hi!')]
    chats.append(chat_of('["a", "b", "Hi!"]'))  # a text that looks like a chat
    sample = sampled(agent(ASSISTANT), CHAT, prompt_tokens=40, batch_size=8, mesh=MESH, seed=5)
    found = sample(chats, 0)
    assert found[3] == NoText('prompt too long')
    assert len(set(found)) == 5
    assert [sample([one], 0)[0] for one in chats] == found
    assert isinstance(found[0], Sampled)
    assert replies(['Hi!']) == [NoText('length') if found[0].truncated else found[0].text]
