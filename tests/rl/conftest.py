"""Fixtures of the tests that train tiny models."""

import jax
import pytest
from jax.sharding import Mesh

from simrl.conversations.chat import Chat
from simrl.models import sharding
from tests.rl import scene


@pytest.fixture(scope='session')
def chat() -> Chat:
    return scene.chat()


@pytest.fixture(scope='session')
def mesh() -> Mesh:
    return sharding.make_mesh(1, 1, jax.devices()[:1])
