"""Stages run once, go on after a kill, and refuse what does not fit them."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from simrl import stages
from simrl.stages import LockedError, WorkdirError

SLICE = {'sft': {'learning_rate': 0.1, 'steps': 10}}


class Work:
    """Counts its calls and leaves a result; can fail half-way."""

    def __init__(self, result: str = 'fine') -> None:
        self.calls = 0
        self.result = result
        self.fails = False

    def __call__(self, folder: pathlib.Path) -> None:
        self.calls += 1
        (folder / 'half').write_text('half')
        if self.fails:
            raise KeyError('half-way')
        (folder / 'result.json').write_text(json.dumps(self.result))


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / 'data.jsonl'
    path.write_text('{}\n')
    return path


def test_runs_once(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    work = Work()
    folder = tmp_path / 'run' / 'sft' / 'assistant'
    assert stages.stage(folder, SLICE, {'data': data}, work) == 'ran'
    assert stages.is_done(folder)
    assert stages.stage(folder, SLICE, {'data': data}, work) == 'done'
    assert work.calls == 1
    done = json.loads((folder / 'done.json').read_text())
    assert done['slice'] == SLICE
    assert done['inputs'] == {'data': 'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356'}


def test_a_stage_that_failed_goes_on(tmp_path: pathlib.Path) -> None:
    work, folder = Work(), tmp_path / 'sft'
    work.fails = True
    with pytest.raises(KeyError):
        stages.stage(folder, SLICE, {}, work)
    assert not stages.is_done(folder)
    assert (folder / 'half').exists()  # what was done stays, for the next call to go on from
    work.fails = False
    assert stages.stage(folder, SLICE, {}, work) == 'ran'
    assert stages.is_done(folder)


@pytest.mark.parametrize('fails', [True, False])
def test_a_changed_slice_is_refused_with_the_difference(tmp_path: pathlib.Path, fails: bool) -> None:
    work, folder = Work(), tmp_path / 'sft'
    work.fails = fails
    try:
        stages.stage(folder, SLICE, {}, work)
    except KeyError:
        assert fails
    changed = {'sft': {'learning_rate': 0.2, 'steps': 10}}
    state = 'started' if fails else 'done'
    with pytest.raises(WorkdirError, match=rf'sft: was {state} .*sft\.learning_rate: 0\.1 -> 0\.2.*--rerun'):
        stages.stage(folder, changed, {}, work)
    assert work.calls == 1

    work.fails = False
    (folder / 'checkpoints').mkdir()
    (folder / 'checkpoints' / 'old').write_text('old')
    assert stages.stage(folder, changed, {}, work, rerun=True) == 'ran'
    assert not (folder / 'checkpoints').exists()  # nothing of the old run is left
    assert stages.stage(folder, changed, {}, work) == 'done'


def test_a_changed_input_is_named(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    work, folder = Work(), tmp_path / 'sft'
    stages.stage(folder, SLICE, {'data': data, 'same': data.parent / 'data.jsonl'}, work)
    data.write_text('{"changed": 1}\n')
    with pytest.raises(WorkdirError, match=r'input data: .* -> '):
        stages.stage(folder, SLICE, {'data': data, 'same': data}, work)
    with pytest.raises(WorkdirError, match=r"expected its input 'data' at .*nowhere, found nothing"):
        stages.stage(folder, SLICE, {'data': tmp_path / 'nowhere'}, work)


def test_a_stage_as_input(tmp_path: pathlib.Path) -> None:
    first, second, work = tmp_path / 'first', tmp_path / 'second', Work()
    work.fails = True
    with pytest.raises(KeyError):
        stages.stage(first, SLICE, {}, work)
    with pytest.raises(WorkdirError, match=r"expected its input 'first' to be done"):
        stages.stage(second, SLICE, {'first': first}, work)
    work.fails = False
    stages.stage(first, SLICE, {}, work)
    stages.stage(second, SLICE, {'first': first}, work)
    # Even where it writes the same bytes again, its results are other ones (a GPU does not repeat itself).
    stages.stage(first, SLICE, {}, work, rerun=True)
    with pytest.raises(WorkdirError, match='input first: '):
        stages.stage(second, SLICE, {'first': first}, work)


def test_hash_of_folders_and_large_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'model'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'sub' / 'a').write_bytes(b'a' * 100)
    first = stages.hash_path(folder)
    (folder / 'sub' / 'a').rename(folder / 'sub' / 'b')
    assert stages.hash_path(folder) != first  # names count
    monkeypatch.setattr(stages, 'LARGE_FILE', 50)
    monkeypatch.setattr(stages, 'FILE_END', 10)
    whole = stages.hash_path(folder / 'sub' / 'b')
    for changed in (b'b' + b'a' * 99, b'a' * 99 + b'b', b'a' * 101):
        (folder / 'sub' / 'b').write_bytes(changed)
        assert stages.hash_path(folder / 'sub' / 'b') != whole


def test_a_folder_of_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'thesis.tex').write_text('years of work')
    for rerun in (False, True):
        with pytest.raises(
            WorkdirError, match=r'expected an empty folder or a stage \(stage\.json\), found thesis\.tex'
        ):
            stages.stage(tmp_path, SLICE, {}, Work(), rerun=rerun)
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


def test_a_kill_while_clearing_is_made_up_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, work = tmp_path / 'sft', Work()
    stages.stage(folder, SLICE, {}, work)

    def killed(_: pathlib.Path) -> None:
        (folder / 'done.json').unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, '_clear', killed)
        with pytest.raises(KeyboardInterrupt):
            stages.stage(folder, SLICE, {}, work, rerun=True)

    def looks(where: pathlib.Path) -> None:
        assert {path.name for path in where.iterdir()} == {'stage.json', 'stage.lock'}

    assert stages.stage(folder, SLICE, {}, looks) == 'ran'


HOLD = """
import pathlib, sys, time
from simrl import stages

def run(folder):
    print('running', flush=True)
    time.sleep(60)

stages.stage(pathlib.Path(sys.argv[1]), {}, {}, run)
"""


def test_a_second_process_is_told_who_works_there(tmp_path: pathlib.Path) -> None:
    folder, work = tmp_path / 'sft', Work()
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == 'running\n'
        with pytest.raises(LockedError, match=f'another process works on this stage .process {process.pid} on '):
            stages.stage(folder, {}, {}, work)
        assert stages.stage(folder, {}, {}, work, locked='skip') == 'locked'
        assert work.calls == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and stages.stage(folder, {}, {}, work, locked='skip') == 'locked':
        time.sleep(0.01)
    assert work.calls == 1  # a kill leaves no lock


def test_stages_run_again_with_what_rests_on_them(tmp_path: pathlib.Path) -> None:
    first, second, other = Work(), Work(), Work()

    def job(*rerun: str) -> list[str]:
        run = stages.Stages(tmp_path, rerun)
        outcomes = [
            run.run('rl/a/seed-0', SLICE, {}, first),
            run.run('evaluate', SLICE, {'arm': tmp_path / 'rl/a/seed-0' / 'result.json'}, second),
            run.run('other', SLICE, {}, other),
        ]
        run.finish()
        return outcomes

    assert job() == ['ran', 'ran', 'ran']
    assert job() == ['done', 'done', 'done']
    assert job('rl') == ['ran', 'ran', 'done']
    assert job('evaluate') == ['done', 'ran', 'done']
    with pytest.raises(WorkdirError, match='--rerun: expected names of stages, found evaluat, which this run lacks'):
        job('evaluat')


def test_another_configs_workdir(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / 'run'
    first = {'sft': {'steps': 1}, 'logging': {'log_every': 1}, 'arms': ['a']}
    stages.open_workdir(workdir, first)
    assert json.loads((workdir / 'config.json').read_text()) == first
    stages.open_workdir(workdir, first)

    second = {'sft': {'steps': 2}, 'logging': {'log_every': 5}, 'arms': ['a', 'b']}
    with pytest.raises(WorkdirError, match=r'run: is the run of another config: sft\.steps: 1 -> 2\. ') as error:
        stages.open_workdir(workdir, second, exempt=('logging', 'arms'))
    assert 'log_every' not in str(error.value)
    assert json.loads((workdir / 'config.json').read_text()) == first

    third = first | {'logging': {'log_every': 5}, 'arms': ['a', 'b']}
    stages.open_workdir(workdir, third, exempt=('logging', 'arms'))
    assert json.loads((workdir / 'config.json').read_text()) == third
    stages.open_workdir(workdir, second, changed=True)
    assert json.loads((workdir / 'config.json').read_text()) == second


def test_a_workdir_of_something_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'photos').mkdir()
    with pytest.raises(WorkdirError, match=r'expected an empty folder or a run \(config\.json\), found photos'):
        stages.open_workdir(tmp_path, {})
    assert not (tmp_path / 'config.json').exists()


def test_a_damaged_config_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'config.json').write_text('{"half')
    with pytest.raises(WorkdirError, match=r'config\.json: expected JSON'):
        stages.open_workdir(tmp_path, {})
