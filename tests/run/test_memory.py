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


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({'memory.max': '9000'}, 9000 + 10240),
        ({'memory.max': '9000', 'memory.swap.max': 'max'}, 9000 + 10240),
        ({'memory.max': '9000', 'memory.swap.max': '0'}, 9000),
        ({'memory.max': 'max', 'memory.swap.max': '0'}, 30720),
        ({'memory.limit_in_bytes': '9000', 'memory.memsw.limit_in_bytes': str(2**63 - 4096)}, 9000 + 10240),
        ({'memory.limit_in_bytes': '9000', 'memory.memsw.limit_in_bytes': '11000'}, 11000),
    ],
)
def test_a_control_group_may_swap(tmp_path, monkeypatch, files, expected):
    for name, text in {'meminfo': 'MemTotal: 20 kB\nSwapTotal: 10 kB\n', **files}.items():
        (tmp_path / name).write_text(f'{text}\n')
    monkeypatch.setattr(memory, 'MEMINFO', tmp_path / 'meminfo')
    monkeypatch.setattr(memory, 'cgroups', lambda controller: [tmp_path])
    assert memory.total_bytes() == expected
