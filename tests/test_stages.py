"""Stages run once, go on after a kill, and refuse what does not fit them."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from simrl import stage_files, stages
from simrl.stages import Event, LockedError, Task, WorkdirError

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


def run(folder: pathlib.Path, slice_, inputs, work, *, again: bool = False) -> str:
    """Runs one stage, first cleared if it is to be run again; what happened to it at the end."""
    task, events = Task(folder.name, slice_, inputs, work), list[Event]()
    stages.clear(folder.parent, [task.name] if again else [])
    stages.run_tasks(folder.parent, [task], tell=events.append)
    return events[-1].what


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / 'data.jsonl'
    path.write_text('{}\n')
    return path


def test_runs_once(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    work = Work()
    folder = tmp_path / 'run' / 'sft' / 'assistant'
    assert run(folder, SLICE, {'data': data}, work) == 'ran'
    assert stages.is_done(folder)
    assert run(folder, SLICE, {'data': data}, work) == 'done'
    assert work.calls == 1
    done = json.loads((folder / 'done.json').read_text())
    assert (done['name'], done['slice']) == ('assistant', SLICE)
    assert done['inputs'] == {'data': 'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356'}


def test_a_stage_that_failed_goes_on(tmp_path: pathlib.Path) -> None:
    work, folder = Work(), tmp_path / 'sft'
    work.fails = True
    with pytest.raises(KeyError):
        run(folder, SLICE, {}, work)
    assert not stages.is_done(folder)
    assert (folder / 'half').exists()  # what was done stays, for the next call to go on from
    work.fails = False
    assert run(folder, SLICE, {}, work) == 'ran'
    assert stages.is_done(folder)


@pytest.mark.parametrize('fails', [True, False])
def test_a_changed_slice_is_refused_with_the_difference(tmp_path: pathlib.Path, fails: bool) -> None:
    work, folder = Work(), tmp_path / 'sft'
    work.fails = fails
    try:
        run(folder, SLICE, {}, work)
    except KeyError:
        assert fails
    changed = {'sft': {'learning_rate': 0.2, 'steps': 10}}
    state = 'started' if fails else 'done'
    with pytest.raises(WorkdirError, match=rf'sft: was {state} .*sft\.learning_rate: 0\.1 -> 0\.2.*--rerun'):
        run(folder, changed, {}, work)
    assert work.calls == 1

    work.fails = False
    (folder / 'checkpoints').mkdir()
    (folder / 'checkpoints' / 'old').write_text('old')
    assert run(folder, changed, {}, work, again=True) == 'ran'
    assert not (folder / 'checkpoints').exists()  # nothing of the old run is left
    assert run(folder, changed, {}, work) == 'done'


def test_a_changed_input_is_named(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    work, folder = Work(), tmp_path / 'run' / 'sft'
    run(folder, SLICE, {'data': data, 'same': data.parent / 'data.jsonl'}, work)
    data.write_text('{"changed": 1}\n')
    with pytest.raises(WorkdirError, match=r'input data: .* -> '):
        run(folder, SLICE, {'data': data, 'same': data}, work)
    with pytest.raises(WorkdirError, match=r"expected its input 'data' at .*nowhere, found nothing"):
        run(folder, SLICE, {'data': tmp_path / 'nowhere'}, work)


def test_a_stage_of_another_run_as_input(tmp_path: pathlib.Path) -> None:
    first, second, work = tmp_path / 'a' / 'first', tmp_path / 'b' / 'second', Work()
    work.fails = True
    with pytest.raises(KeyError):
        run(first, SLICE, {}, work)
    with pytest.raises(WorkdirError, match=r"expected its input 'first' to be done"):
        run(second, SLICE, {'first': first}, work)
    work.fails = False
    run(first, SLICE, {}, work)
    run(second, SLICE, {'first': first}, work)
    # What rests on it stays good exactly where it leaves the same bytes again.
    run(first, SLICE, {}, work, again=True)
    assert run(second, SLICE, {'first': first}, work) == 'done'
    run(first, SLICE, {}, Work('another result'), again=True)
    with pytest.raises(WorkdirError, match=r'second: was done .*input first: .*\(--rerun=second\)'):
        run(second, SLICE, {'first': first}, work)


def tampered(folder: pathlib.Path, how: str) -> None:
    if how == 'result.json was changed':
        text = (folder / 'result.json').read_text()
        (folder / 'result.json').write_text(text[::-1])  # of the same size
    elif how == 'half is missing':
        (folder / 'half').unlink()
    else:
        (folder / 'deep').mkdir()
        (folder / 'deep' / 'more').write_text('more')


@pytest.mark.parametrize('how', ['result.json was changed', 'half is missing', 'deep/more was added'])
def test_a_done_stage_whose_files_were_changed_is_named(tmp_path: pathlib.Path, how: str) -> None:
    folder, work = tmp_path / 'run' / 'sft', Work()
    run(folder, SLICE, {}, work)
    tampered(folder, how)
    named = rf'sft: expected the files that the stage sft left, found that {how}; --rerun=sft'
    with pytest.raises(WorkdirError, match=named):
        run(folder, SLICE, {}, work)
    with pytest.raises(WorkdirError, match=named):
        run(tmp_path / 'other' / 'rl', SLICE, {'simulator': folder}, work)
    assert work.calls == 1
    assert run(folder, SLICE, {}, work, again=True) == 'ran'
    assert run(tmp_path / 'other' / 'rl', SLICE, {'simulator': folder}, work) == 'ran'


@pytest.mark.parametrize(
    ('name', 'field', 'message'),
    [
        ('stage.json', 'slice', r'stage\.json: expected slice and inputs, found inputs'),
        ('done.json', 'outputs', r'done\.json: expected what this version writes, found no outputs'),
        ('done.json', 'name', r'done\.json: expected what this version writes, found no name'),
    ],
)
def test_a_stages_own_files_were_changed(tmp_path: pathlib.Path, name: str, field: str, message: str) -> None:
    run(tmp_path / 'sft', SLICE, {}, Work())
    path = tmp_path / 'sft' / name
    path.write_text(json.dumps({key: x for key, x in json.loads(path.read_text()).items() if key != field}))
    with pytest.raises(WorkdirError, match=message):
        run(tmp_path / 'sft', SLICE, {}, Work())
    path.write_text('[]')
    with pytest.raises(WorkdirError, match='expected a JSON object, found list'):
        run(tmp_path / 'sft', SLICE, {}, Work())


def test_scratch_and_what_a_kill_left_are_no_files_of_a_stage(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'sft'

    def work(where: pathlib.Path) -> None:
        (where / 'checkpoints').mkdir()
        (where / 'checkpoints' / 'state').write_text('large')
        (where / 'params').mkdir()
        (where / 'params' / 'checkpoints').write_text('stays')

    run(folder, SLICE, {}, work)
    assert not (folder / 'checkpoints').exists()
    assert set(json.loads((folder / 'done.json').read_text())['outputs']) == {'params/checkpoints'}
    (folder / 'checkpoints').mkdir()  # as after a kill just before they were removed
    (folder / 'done.json.1.new').write_text('{')
    assert run(folder, SLICE, {}, work) == 'done'
    assert not (folder / 'checkpoints').exists()


def test_the_stage_seconds_a_stage_are_kept_and_make_nothing_out_of_date(tmp_path: pathlib.Path) -> None:
    first, work = tmp_path / 'a' / 'first', Work()
    for seconds in (0.0, 0.05):
        run(first, SLICE, {}, lambda folder, seconds=seconds: time.sleep(seconds), again=True)
        assert seconds <= stages.stage_seconds(first) < seconds + 5
        run(tmp_path / 'b' / 'second', SLICE, {'first': first}, work)
    assert work.calls == 1


def test_hash_of_folders_and_large_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'model'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'sub' / 'a').write_bytes(b'a' * 100)
    first = stage_files.hash_path(folder)
    (folder / 'sub' / 'a').rename(folder / 'sub' / 'b')
    assert stage_files.hash_path(folder) != first  # names count
    monkeypatch.setattr(stage_files, 'LARGE_FILE', 50)
    monkeypatch.setattr(stage_files, 'FILE_END', 10)
    whole = stage_files.hash_path(folder / 'sub' / 'b')
    for changed in (b'b' + b'a' * 99, b'a' * 99 + b'b', b'a' * 101):
        (folder / 'sub' / 'b').write_bytes(changed)
        assert stage_files.hash_path(folder / 'sub' / 'b') != whole


def test_a_folder_of_something_else_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'thesis.tex').write_text('years of work')
    for again in (False, True):
        with pytest.raises(
            WorkdirError, match=r'expected an empty folder or a stage \(stage\.json\), found thesis\.tex'
        ):
            run(tmp_path, SLICE, {}, Work(), again=again)
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'


class Killed(BaseException):
    """Where the process is killed."""


@pytest.mark.parametrize('moment', range(4))
def test_a_kill_while_clearing_is_made_up_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    folder, work = tmp_path / 'sft', Work()
    run(folder, SLICE, {}, work)
    unlink, left = pathlib.Path.unlink, moment

    def killed(path: pathlib.Path, missing_ok: bool = False) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, 'unlink', killed)
        with pytest.raises(Killed):
            run(folder, SLICE, {}, work, again=True)

    def looks(where: pathlib.Path) -> None:
        assert {path.name for path in where.iterdir()} == {'stage.json', 'stage.lock'}

    assert run(folder, SLICE, {}, looks) == 'ran'


HOLD = """
import pathlib, sys, time
from simrl import stages

def work(folder):
    print('running', flush=True)
    time.sleep(60)

stages.run_tasks(pathlib.Path(sys.argv[1]), [stages.Task('sft', {}, {}, work)])
"""


def test_a_second_process_is_told_who_works_there(tmp_path: pathlib.Path) -> None:
    work, other = Work(), Work()
    tasks = [Task('sft', {}, {}, work), Task('other', {}, {}, other), Task('rl', {}, {'sft': tmp_path / 'sft'}, work)]
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    events = list[Event]()

    def tell(event: Event) -> None:
        events.append(event)
        if event.what == 'waits':
            process.send_signal(signal.SIGKILL)  # it leaves no lock

    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ['\n', '== sft\n', 'running\n']
        holder = f'process {process.pid} on '
        with pytest.raises(LockedError, match=f'another process works on this stage .{holder}'):
            stages.run_tasks(tmp_path, tasks)
        with pytest.raises(LockedError, match=f'another process works on this stage .{holder}'):
            stages.clear(tmp_path, ['sft'])
        assert (work.calls, other.calls) == (0, 0)
        stages.run_tasks(tmp_path, tasks, held='wait', tell=tell)
    finally:
        process.kill()
        process.wait()
    happened = [(event.stage, event.what) for event in events if event.what != 'starts']
    assert happened == [('other', 'ran'), ('sft', 'waits'), ('sft', 'ran'), ('rl', 'ran')]
    assert events[2].holder.startswith(holder)


def job(workdir: pathlib.Path, **works: Work) -> list[Task]:
    """Two arms, an evaluation that rests on one of them, a summary that rests on the evaluation, and another stage."""
    inputs = {'evaluate': ('rl/a/seed-0',), 'summary': ('evaluate',)}
    names = {'rl/a/seed-0': 'arm', 'rl/b/seed-0': 'arm', 'evaluate': 'evaluate', 'summary': 'summary', 'other': 'other'}
    return [
        Task(name, SLICE, {read: workdir / read for read in inputs.get(name, ())}, works.get(key, Work()))
        for name, key in names.items()
    ]


@pytest.mark.parametrize(
    ('rerun', 'expected'),
    [
        ((), []),
        (('rl',), ['rl/a/seed-0', 'rl/b/seed-0', 'evaluate', 'summary']),
        (('rl/a/',), ['rl/a/seed-0', 'evaluate', 'summary']),
        (('rl/b/seed-0', 'summary'), ['rl/b/seed-0', 'summary']),
        (('other',), ['other']),
    ],
)
def test_stages_to_run_again_with_what_rests_on_them(tmp_path: pathlib.Path, rerun, expected) -> None:
    tasks = job(tmp_path)
    stages.run_tasks(tmp_path, tasks)
    again = stages.to_run_again(tmp_path, tasks, rerun)
    assert again == expected
    stages.clear(tmp_path, again)
    events = list[Event]()
    stages.run_tasks(tmp_path, tasks, tell=events.append)
    assert [event.stage for event in events if event.what == 'ran'] == expected


def test_what_was_cleared_goes_on_after_a_kill(tmp_path: pathlib.Path) -> None:
    """The command without --rerun, after one with it was killed in a later stage, does not begin again."""
    arm, evaluate = Work(), Work()
    tasks = job(tmp_path, arm=arm, evaluate=evaluate)
    stages.run_tasks(tmp_path, tasks)
    stages.clear(tmp_path, stages.to_run_again(tmp_path, tasks, ['rl/a']))
    evaluate.fails = True
    with pytest.raises(KeyError):
        stages.run_tasks(tmp_path, tasks)
    evaluate.fails = False
    stages.run_tasks(tmp_path, tasks)
    assert (arm.calls, evaluate.calls) == (3, 3)  # two arms and one of them again; begun, failed, gone on with


@pytest.mark.parametrize('name', ['evaluat', 'rl/a/seed', 'seed-0'])
def test_an_unknown_stage_to_run_again(tmp_path: pathlib.Path, name: str) -> None:
    message = f'--rerun: expected names of stages, found {name}, which this run lacks; it has rl/a/seed-0, rl/b/'
    with pytest.raises(WorkdirError, match=message):
        stages.to_run_again(tmp_path, job(tmp_path), ['other', name])


def test_tasks_out_of_order(tmp_path: pathlib.Path) -> None:
    tasks = job(tmp_path)
    with pytest.raises(WorkdirError, match=r'summary: .* stages that come before it, found evaluate'):
        stages.run_tasks(tmp_path, [*tasks[:2], *tasks[:1:-1]])
    for name in ('rl/a', 'other', 'other/deeper'):
        with pytest.raises(ValueError, match=f'{name}: expected a folder of its own'):
            stages.run_tasks(tmp_path, [*tasks, Task(name, {}, {}, Work())])
    assert not list(tmp_path.iterdir())


def config_of(workdir: pathlib.Path) -> dict:
    """What config.json says, but for the format and the version."""
    config = json.loads((workdir / 'config.json').read_text())
    assert config.pop('format') == stages.FORMAT
    assert config.pop('version')
    return config


def test_another_configs_workdir(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / 'run'
    first = {'sft': {'steps': 1}, 'logging': {'log_every': 1}, 'arms': ['a']}
    stages.open_workdir(workdir, first)
    assert config_of(workdir) == first
    stages.open_workdir(workdir, first)

    second = {'sft': {'steps': 2}, 'logging': {'log_every': 5}, 'arms': ['a', 'b']}
    with pytest.raises(WorkdirError, match=r'run: is the run of another config: sft\.steps: 1 -> 2\. ') as error:
        stages.open_workdir(workdir, second, exempt=('logging', 'arms'))
    assert 'log_every' not in str(error.value)
    assert config_of(workdir) == first

    third = first | {'logging': {'log_every': 5}, 'arms': ['a', 'b']}
    stages.open_workdir(workdir, third, exempt=('logging', 'arms'))
    assert config_of(workdir) == third
    stages.open_workdir(workdir, second, changed=True)
    assert config_of(workdir) == second


@pytest.mark.parametrize('found', [{}, {'format': 0, 'version': '9.9.9'}])
def test_a_workdir_of_another_version(tmp_path: pathlib.Path, found: dict) -> None:
    (tmp_path / 'config.json').write_text(json.dumps({'arms': ['a'], **found}))
    expected = r'expected a run of format 1 \(simrl \d.*\), found one of format '
    expected += r'0 \(simrl 9\.9\.9\)' if found else r'unknown \(simrl unknown\)'
    for changed in (False, True):
        with pytest.raises(WorkdirError, match=expected + r'\. Choose another workdir'):
            stages.open_workdir(tmp_path, {'arms': ['a']}, changed=changed)


def test_a_newer_version_of_the_same_format_goes_on(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'config.json').write_text(json.dumps({'arms': ['a'], 'format': stages.FORMAT, 'version': '0.0.1'}))
    stages.open_workdir(tmp_path, {'arms': ['a']})
    assert json.loads((tmp_path / 'config.json').read_text())['version'] != '0.0.1'


def test_a_workdir_of_something_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'photos').mkdir()
    with pytest.raises(WorkdirError, match=r'expected an empty folder or a run \(config\.json\), found photos'):
        stages.open_workdir(tmp_path, {})
    assert not (tmp_path / 'config.json').exists()


def test_a_damaged_config_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / 'config.json').write_text('{"half')
    with pytest.raises(WorkdirError, match=r'config\.json: expected JSON'):
        stages.open_workdir(tmp_path, {})
