"""Replies of a model on the device to single prompts."""

import jax
import pytest

from simrl.conversations.chat import ASSISTANT
from simrl.conversations.completion import NoText
from simrl.conversations.records import Message
from simrl.models import sharding
from simrl.rollouts.completion import complete
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


def test_only_chats_of_one_user_message_are_taken() -> None:
    function = complete(agent(ASSISTANT), CHAT, prompt_tokens=40, batch_size=8, mesh=MESH)
    with pytest.raises(ValueError, match=r"expected chats of one user message, found \['system', 'user'\]"):
        function([(Message('system', 'a'), Message('user', 'b'))], 0)
