"""Stages run once, go on after a kill, and refuse what does not fit them."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from simrl.run import stage_files, stages
from simrl.run.stages import Event, LockedError, Task, WorkdirError

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


def test_what_is_read_is_not_cleared_and_is_looked_at_by_others(tmp_path: pathlib.Path) -> None:
    """A command of other arms knows nothing of the stage that works here, but reads the same stages."""
    plan, events = job(tmp_path), list[Event]()
    arm = next(task for task in plan if task.name == 'rl/a/seed-0')

    def reads(folder: pathlib.Path) -> None:
        with pytest.raises(LockedError, match=r'stage .process unknown, which may only read it.; stop it first'):
            stages.clear(tmp_path, [arm.name])
        stages.run_tasks(tmp_path, [arm], tell=events.append)

    stages.run_tasks(tmp_path, [arm, Task('reads', {}, {'arm': tmp_path / arm.name}, reads)])
    assert events == [Event(arm.name, 'done')]
    stages.clear(tmp_path, [arm.name])
    assert not stages.is_done(tmp_path / arm.name)


def test_a_stage_that_was_run_again_meanwhile_is_not_gone_on_with(tmp_path: pathlib.Path) -> None:
    """What this process read of it may still be in its memory, while its folder holds something else."""
    first = Task('first', {}, {}, Work())
    reads = {'first': tmp_path / 'first'}
    last = Work()

    def tell(event: Event) -> None:
        if event == Event('second', 'ran', event.seconds):  # as another process might
            stages.clear(tmp_path, ['first'])
            stages.run_tasks(tmp_path, [first])

    with pytest.raises(WorkdirError, match='first: another process ran this stage again since it was read'):
        stages.run_tasks(tmp_path, [first, Task('second', {}, reads, Work()), Task('last', {}, reads, last)], tell=tell)
    assert last.calls == 0
    stages.run_tasks(tmp_path, [first, Task('last', {}, reads, last)])
    assert last.calls == 1


def test_a_copy_without_a_lock_that_cannot_be_written_to_is_read(tmp_path, monkeypatch) -> None:
    run(tmp_path / 'copy', SLICE, {}, Work())
    (tmp_path / 'copy' / 'stage.lock').unlink()
    monkeypatch.setattr(os, 'access', lambda path, _: path != tmp_path / 'copy')
    assert run(tmp_path / 'run' / 'rl', SLICE, {'copy': tmp_path / 'copy'}, Work()) == 'ran'
    assert not (tmp_path / 'copy' / 'stage.lock').exists()


FINISH = """
import json, os, pathlib, sys, time
from simrl import stage_files

results, value = pathlib.Path(sys.argv[1]), [os.getpid()] * 20000
for _ in range(int(sys.argv[2])):
    with stage_files.alone_in(results):
        os.close(os.open(results.parent / 'busy', os.O_CREAT | os.O_EXCL))  # fails where another is in here
        for name in 'abcde':
            stage_files.write_json(results / f'{name}.json', value)
            print(name, flush=True)
        assert all(json.loads((results / f'{name}.json').read_text()) == value for name in 'abcde')
        (results.parent / 'busy').unlink()
"""


def finish(results: pathlib.Path, times: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, '-c', FINISH, str(results), str(times)], stdout=subprocess.PIPE, text=True)


def test_two_processes_that_finish_at_once_take_turns(tmp_path: pathlib.Path) -> None:
    processes = [finish(tmp_path / 'results', 3) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(''.join(line for line in text.split() if len(line) == 1) == 3 * 'abcde' for text in said)


def test_a_killed_writer_leaves_whole_files(tmp_path: pathlib.Path) -> None:
    results = tmp_path / 'results'
    for lines in (1, 7, 8, 14, 20):
        process = finish(results, 1000)
        assert process.stdout is not None
        assert all(process.stdout.readline() for _ in range(lines))
        process.kill()
        process.communicate()
        for path in results.glob('*.json'):
            assert len(set(json.loads(path.read_text()))) == 1
        (tmp_path / 'busy').unlink(missing_ok=True)
    (results / 'a.json.1.new').write_text('[1, ')  # as after a kill just before it was renamed
    with stage_files.alone_in(results):
        assert {path.name for path in results.iterdir()} == {'stage.lock', *(f'{name}.json' for name in 'abcde')}


def test_json_is_written_as_results_are(tmp_path: pathlib.Path) -> None:
    for value in ({'mean': 0.1, 'rows': [1, 2]}, [{'person': 'p'}, None]):
        stage_files.write_json(tmp_path / 'result.json', value)
        assert (tmp_path / 'result.json').read_text() == json.dumps(value, indent=1) + '\n'


def files(workdir: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what it holds."""
    paths = [path for path in workdir.rglob('*') if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def with_slices(tasks: list[Task], **changes: dict) -> list[Task]:
    """The tasks with changed fields of `sft` in the slices of some, by the first part of their names."""
    changed = [SLICE['sft'] | changes.get(task.name.split('/')[0], {}) for task in tasks]
    return [dataclasses.replace(task, slice_={'sft': sft}) for task, sft in zip(tasks, changed, strict=True)]


def test_all_stages_of_other_settings_are_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    workdir, other = tmp_path / 'run', Work()
    tasks, settings = job(workdir, other=other), {'arms': ['a', 'b']}
    stages.open_workdir(workdir, settings, tasks)
    other.fails = True
    with pytest.raises(KeyError):
        stages.run_tasks(workdir, tasks)
    before = files(workdir)
    changed = with_slices(tasks, rl={'steps': 20}, summary={'steps': 20}, other={'steps': 5, 'learning_rate': 1})
    for again in ([], ['evaluate']):
        with pytest.raises(WorkdirError) as error:
            stages.open_workdir(workdir, settings | {'arms': ['a']}, changed, exempt=('arms',), again=again)
        assert str(error.value) == (
            f'{workdir}: stages were started or done with other settings: rl/a/seed-0, rl/b/seed-0, summary '
            '(sft.steps: 10 -> 20); other (sft.learning_rate: 0.1 -> 1; sft.steps: 10 -> 5). Have them run again '
            '(--rerun=rl,other), or use another workdir'  # summary rests on the first
        )
    assert files(workdir) == before

    again = stages.to_run_again(workdir, changed, ['rl/a/seed-0', 'rl/b/seed-0', 'other'])
    stages.open_workdir(workdir, settings | {'arms': ['a']}, changed, exempt=('arms',), again=again)
    other.fails = False
    stages.run_tasks(workdir, changed)
    assert other.calls == 2
    assert config_of(workdir) == {'arms': ['a']}


def run_of_many(workdir: pathlib.Path, steps: int = 10) -> list[Task]:
    """Four arms of eight seeds, of which one has other steps, each assistant with its people."""
    fields = {(arm, seed): {'steps': steps if arm != 'd' else 10} for seed in range(8) for arm in 'abcd'}
    names = {f'{arm}/seed-{seed}': sft for (arm, seed), sft in fields.items()}
    trained = [Task(f'rl/{name}', {'sft': SLICE['sft'] | sft}, {}, Work()) for name, sft in names.items()]
    return trained + [Task(f'people/{name}', SLICE, {'rl': workdir / 'rl' / name}, Work()) for name in names]


def test_a_refusal_of_many_stages_is_short_and_each_is_looked_at_once(tmp_path, monkeypatch) -> None:
    tasks = run_of_many(tmp_path)
    stages.open_workdir(tmp_path, {}, tasks)
    stages.run_tasks(tmp_path, tasks)
    read, looks = stages._stages_read, []
    monkeypatch.setattr(stages, '_stages_read', lambda *args: looks.append(args) or read(*args))
    changed = run_of_many(tmp_path, 20)
    with pytest.raises(WorkdirError) as error:
        stages.open_workdir(tmp_path, {}, changed)
    assert len(looks) == len(tasks)
    assert str(error.value).removeprefix(f'{tmp_path}: ') == (
        'stages were started or done with other settings: rl/a/seed-0, rl/b/seed-0, rl/c/seed-0, rl/a/seed-1, '
        'rl/b/seed-1 and 19 more (sft.steps: 10 -> 20). Have them run again (--rerun=rl/a,rl/b,rl/c), or use another '
        'workdir'
    )
    again = stages.to_run_again(tmp_path, changed, ['rl/a', 'rl/b', 'rl/c'])
    stages.open_workdir(tmp_path, {}, changed, again=again)  # those are enough
    events = list[Event]()
    stages.run_tasks(tmp_path, changed, tell=events.append)
    ran = {event.stage for event in events if event.what == 'ran'}
    assert ran == {task.name for task in tasks if '/d/' not in task.name}


def test_stages_that_are_new_or_of_other_arms_are_not_compared(tmp_path: pathlib.Path) -> None:
    both = job(tmp_path)
    apart = [task for task in both if task.name != 'rl/b/seed-0']
    stages.open_workdir(tmp_path, {}, apart)
    stages.run_tasks(tmp_path, apart)
    before = {name: content for name, content in files(tmp_path).items() if name.endswith('result.json')}
    stages.open_workdir(tmp_path, {}, both)  # an arm more
    stages.run_tasks(tmp_path, both)
    changed = with_slices(both, rl={'steps': 20})
    stages.open_workdir(tmp_path, {}, [task for task in changed if not task.name.startswith('rl/')])
    assert before.items() <= files(tmp_path).items()
    for name in ('rl/a/seed-0', 'rl/b/seed-0'):  # as after a kill while they were cleared
        (tmp_path / name / 'stage.json').write_text('{"clearing": true}')
    stages.open_workdir(tmp_path, {}, changed)


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
    stages.open_workdir(workdir, second, again=['sft'])
    assert config_of(workdir) == second


@pytest.mark.parametrize('found', [{}, {'format': 0, 'version': '9.9.9'}])
def test_a_workdir_of_another_version(tmp_path: pathlib.Path, found: dict) -> None:
    (tmp_path / 'config.json').write_text(json.dumps({'arms': ['a'], **found}))
    expected = rf'expected a run of format {stages.FORMAT} \(simrl \d.*\), found one of format '
    expected += r'0 \(simrl 9\.9\.9\)' if found else r'unknown \(simrl unknown\)'
    for again in ([], ['sft']):
        with pytest.raises(WorkdirError, match=expected + r'\. Choose another workdir'):
            stages.open_workdir(tmp_path, {'arms': ['a']}, again=again)


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
