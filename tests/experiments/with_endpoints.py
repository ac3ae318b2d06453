"""A config for `tools.soak faults`: a remote simulator and a remote judge at one server of the tests, named by its URL.

The server's answers are functions of what it is asked. With `transient`, a share of the requests fails first.
"""

import hashlib
import json
from typing import Any

from ml_collections import ConfigDict

from configs import smollm2
from simrl.experiments.judges import PanelSettings, RewardSettings
from simrl.experiments.pretrained_settings import PretrainedSimulator, RemoteSettings
from simrl.remote.settings import EndpointSettings
from simrl.run.config import to_config_dict
from tests.remote.server import Cut, Hang, Reply, Status, chat_reply

ARM = 'remote'
SHARE = 0.3  # of requests that fail first
FAULTS: tuple[Reply, ...] = (
    Status(500),
    Status(429),
    Status(429, headers={'Retry-After': '0.02'}),
    Cut(b'{"choices": [{"message": {"content": "half', keep=20),
    Hang(),
)


def get_config(url: str) -> ConfigDict:
    config = smollm2.get_config('smoke')
    endpoint = EndpointSettings(url, 'model', tries=8, backoff=0.01, max_backoff=0.05, try_seconds=1.0)
    remote = RemoteSettings(endpoint, form='json')
    with config.unlocked(), config.ignore_type():
        config.arms = ConfigDict({ARM: to_config_dict(PretrainedSimulator('role_play', remote=remote))})
        config.reward = to_config_dict(RewardSettings('panel', panel=PanelSettings({'judge': endpoint})))
        config.compute.rows_in_flight = 4
        config.workers = 1
    return config


def number_of(body: dict[str, Any]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()[:8])


def answers(body: dict[str, Any], attempt: int) -> Reply:
    """A score, or a message that now and then ends the conversation or breaks the rules."""
    number = number_of(body)
    if 'score' in body['response_format']['json_schema']['schema']['properties']:
        return chat_reply(json.dumps({'thought': f'of {number % 7}', 'score': number % 11}))
    if number % 9 == 0:
        return chat_reply('no JSON')
    said = '[END]' if number % 5 == 0 else f'and {number % 100}?'
    return chat_reply(json.dumps({'current_answer': 'none', 'thought': 'more', 'response': said}))


def transient(body: dict[str, Any], attempt: int) -> Reply:
    """Of `SHARE` of the requests the first two tries fail, each in a way of its own."""
    number = number_of(body) // 11
    if attempt < 2 and number % 1000 < 1000 * SHARE:
        return FAULTS[(number // 1000 + attempt) % len(FAULTS)]
    return answers(body, attempt)
