"""Several processes are one run: they know the same, write once, and end together."""

import json
import pathlib

import pytest

from simrl.run import processes
from tests import many_devices
from tests.run import two_processes


def test_one_process_leads_and_waits_for_nobody() -> None:
    assert (processes.count(), processes.index(), processes.leads()) == (1, 0, True)
    value = object()  # that no other process could read
    assert processes.gather('x', value) == [value]
    assert processes.broadcast('x', value) is value
    assert processes.agree_on_signal(15) == 15
    with pytest.raises(KeyError), processes.ending_together():
        raise KeyError


def test_processes_run_the_same_stages_and_end_with_the_one_that_fails(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / 'run'
    commands = [(two_processes.__name__, str(workdir))] * 2
    first, second = many_devices.end(many_devices.start_processes(commands, own=many_devices.slurm(2)))
    found = [json.loads(line) for one in (first, second) for line in one.output.splitlines() if line[0:1] == '{']
    assert len(found) == 2, first.errors + second.errors
    for one in found:
        assert (one['gathered'], one['broadcast'], one['points'] > 0) == ([1, 2], 1, True)
        assert one['checked'] == 2  # each stage before its own run, and not when it is done
        assert one['done'] == ['first', 'second']  # `second` read what process 0 wrote, in both
        assert 'stage differing: expected the same in all 2 processes' in one['differing']
        assert ': settings.x: 0 -> 1' in one['differing']
    lines = [line for line in first.output.splitlines() if line.startswith('== ')]
    assert lines == [
        *('== first', '== first: finished in 0 s', '== first: already done', '== second', '== second: finished in 0 s'),
        *('== first: already done', '== differing', '== first: already done', '== broken'),
    ]
    assert (first.code, second.code) == (1, 1)
    assert 'OSError: no line' in second.errors
    assert 'process 0: stopped, because of process 1 on ' in first.errors
    assert first.errors.strip().endswith(': OSError: no line')
    assert sorted(path.parent.name for path in workdir.glob('*/done.json')) == ['first', 'second']
    assert not [path for path in workdir.iterdir() if path.name.startswith('.')]
