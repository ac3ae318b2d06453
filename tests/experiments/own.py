"""A simulator of one's own that no recorded conversation can go on with."""

from collections.abc import Sequence

import numpy as np

from simrl.experiments.scene import Scene
from simrl.rollouts.agents import HostAgent, HostConversation, Reply


def silent(scene: Scene) -> HostAgent:
    def reply(conversations: Sequence[HostConversation], seeds: np.ndarray) -> list[Reply]:
        return [Reply('thai', ends=len(conversation.messages) >= 2) for conversation in conversations]

    return HostAgent(reply, max_new_tokens=scene.limits.user_tokens)
