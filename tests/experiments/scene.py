"""Settings of both scenes' smallest experiments, with changes by dotted field."""

import importlib
from typing import Any

from simrl.experiments.experiment import settings_of
from simrl.run.config import to_dict

CONCIERGE_ARMS = {
    'role_play': {'simulator': 'role_play', 'size': 'medium'},
    'persona': {'simulator': 'persona', 'size': 'medium'},
    'fine_tuned': {'simulator': 'fine_tuned', 'size': 'medium'},
    'oracle': {'simulator': 'people', 'size': 'medium'},
}


def arms(*names: str) -> dict[str, dict[str, Any]]:
    """Some arms of the quickstart."""
    return {name: CONCIERGE_ARMS[name] for name in names}


def settings(config: str = 'quickstart', arg: str = 'smoke', **changes: Any) -> Any:
    """The settings of a config; a change is named by its dotted field, with '__' for each dot."""
    plain = to_dict(importlib.import_module(f'configs.{config}').get_config(arg))
    for field, value in changes.items():
        part = plain
        *path, last = field.split('__')
        for key in path:
            part = part[key]
        part[last] = value
    return settings_of(plain)
