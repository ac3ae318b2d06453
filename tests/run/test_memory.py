"""The memory that a device has: what JAX took of an accelerator, or a share of this machine's."""

import types

import jax
import pytest

from simrl.run import memory


def devices(platform, *limits):
    found = [{} if limit is None else {'bytes_limit': limit} for limit in limits]
    return [types.SimpleNamespace(platform=platform, memory_stats=lambda stats=stats: stats) for stats in found]


@pytest.mark.parametrize(
    ('platform', 'limits', 'expected'),
    [('gpu', (80, 70), 70), ('tpu', (16,), 16), ('gpu', (80, None), None), ('cpu', (None, None, None), 1024 * 30 // 2)],
)
def test_the_limit_of_a_device(tmp_path, monkeypatch, platform, limits, expected):
    (tmp_path / 'meminfo').write_text('MemTotal: 20 kB\nMemAvailable: 5 kB\nSwapTotal: 10 kB\n')
    monkeypatch.setattr(memory, 'MEMINFO', tmp_path / 'meminfo')
    monkeypatch.setattr(memory, 'cgroups', lambda controller: [])
    monkeypatch.setattr(jax, 'local_devices', lambda: devices(platform, *limits))
    assert memory.device_limit(2) == expected


def test_of_a_machine_that_does_not_say_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, 'MEMINFO', tmp_path / 'meminfo')
    monkeypatch.setattr(memory, 'cgroups', lambda controller: [])
    monkeypatch.setattr(jax, 'local_devices', lambda: devices('cpu', None))
    assert memory.device_limit(1) is None
