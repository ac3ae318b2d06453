"""Stages run once, resume after a kill, and refuse what does not fit them."""

import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from simrl.run import stage_files, stages
from simrl.run.config import ConfigError
from simrl.run.stages import Event, LockedError, Stage, WorkdirError, open_workdir, run_stages, select, stages_to_rerun

SETTINGS = {'sft': {'learning_rate': 0.1, 'steps': 10}}


class Work:
    """Counts its calls and writes a result; can fail after half of it."""

    def __init__(self, result: str = 'fine') -> None:
        self.calls, self.result, self.fails = 0, result, False

    def __call__(self, folder: pathlib.Path) -> None:
        self.calls += 1
        (folder / 'half').write_text('half')
        if self.fails:
            raise KeyError('half-way')
        (folder / 'result.json').write_text(json.dumps(self.result))


class Killed(BaseException):
    """Stands for the kill of the process."""


def run(
    workdir: pathlib.Path, plan: Sequence[Stage], *rerun: str, config: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, str]:
    """Runs stages as the main program does; the last event of each."""
    events = list[Event]()
    open_workdir(workdir, config or {}, plan, rerun=stages_to_rerun(workdir, plan, rerun))
    run_stages(workdir, plan, on_event=events.append, **options)
    return {event.stage: event.kind for event in events}


def run_one(folder: pathlib.Path, settings, inputs, work, *, rerun: bool = False) -> str:
    stage = Stage(folder.name, settings, inputs, work)
    return run(folder.parent, [stage], *([stage.name] if rerun else []))[stage.name]


def five_stages(workdir: pathlib.Path, settings: Mapping[str, Any] | None = None, **works: Any) -> list[Stage]:
    """Two arms, an evaluation of one of them, a summary of the evaluation, and a stage of its own.

    Args:
        settings: changed fields of `sft`, by the first part of a stage's name.
        works: by the first part of a stage's name.
    """
    reads = {'rl/a/seed-0': [], 'rl/b/seed-0': [], 'evaluate': ['rl/a/seed-0'], 'summary': ['evaluate'], 'other': []}
    kinds = {name: name.split('/')[0] for name in reads}
    return [
        Stage(
            name,
            {'sft': SETTINGS['sft'] | (settings or {}).get(kinds[name], {})},
            {read: workdir / read for read in inputs},
            works.get(kinds[name], Work()),
        )
        for name, inputs in reads.items()
    ]


def files(workdir: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """mtime and content of every file but the locks."""
    paths = [path for path in workdir.rglob('*') if path.is_file() and path.name != stage_files.LOCK_FILE]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / 'data.jsonl'
    path.write_text('{}\n')
    return path


def test_a_stage_runs_once_and_resumes_after_a_failure(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    work, folder = Work(), tmp_path / 'run' / 'sft'
    work.fails = True
    with pytest.raises(KeyError):
        run_one(folder, SETTINGS, {'data': data}, work)
    assert not stages.is_done(folder)
    assert (folder / 'half').exists()  # for the next call to resume from
    work.fails = False
    assert run_one(folder, SETTINGS, {'data': data}, work) == 'finished'
    assert run_one(folder, SETTINGS, {'data': data}, work) == 'skipped'
    assert work.calls == 2
    done = json.loads((folder / 'done.json').read_text())
    assert (done['name'], done['settings']) == ('sft', SETTINGS)
    assert done['inputs'] == {'data': 'ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356'}
    assert set(done['outputs']) == {'half', 'result.json'}


def test_a_changed_input_is_named(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    work, folder = Work(), tmp_path / 'run' / 'sft'
    run_one(folder, SETTINGS, {'data': data, 'same': data}, work)
    data.write_text('{"changed": 1}\n')
    with pytest.raises(WorkdirError, match=r'sft: done with other settings or inputs: input data: .* -> .*--rerun=sft'):
        run_one(folder, SETTINGS, {'data': data, 'same': data}, work)
    with pytest.raises(WorkdirError, match=r"expected its input 'data' at .*nowhere, found nothing"):
        run_one(folder, SETTINGS, {'data': tmp_path / 'nowhere'}, work)


def test_a_stage_of_another_run_as_input(tmp_path: pathlib.Path) -> None:
    first, second, work = tmp_path / 'a' / 'first', tmp_path / 'b' / 'second', Work()
    work.fails = True
    with pytest.raises(KeyError):
        run_one(first, SETTINGS, {}, work)
    with pytest.raises(WorkdirError, match=r"expected its input 'first' to be done"):
        run_one(second, SETTINGS, {'first': first}, work)
    work.fails = False
    run_one(first, SETTINGS, {}, work)
    run_one(second, SETTINGS, {'first': first}, work)
    # What depends on it stays valid exactly if the rerun writes the same bytes (it takes other times).
    run_one(first, SETTINGS, {}, work, rerun=True)
    assert stages.stage_seconds(first) > 0
    assert run_one(second, SETTINGS, {'first': first}, work) == 'skipped'
    run_one(first, SETTINGS, {}, Work('another result'), rerun=True)
    with pytest.raises(WorkdirError, match=r'second: done .*input first: .*\(--rerun=second\)'):
        run_one(second, SETTINGS, {'first': first}, work)


def test_changed_and_missing_outputs_are_named_and_other_files_are_ignored(tmp_path: pathlib.Path) -> None:
    folder, work = tmp_path / 'run' / 'sft', Work()
    run_one(folder, SETTINGS, {}, work)
    (folder / '.ipynb_checkpoints').mkdir()
    (folder / '.ipynb_checkpoints' / 'result.json').write_text('foreign')
    os.utime(folder / 'result.json', ns=(0, 0))  # as after a copy: the same bytes of another time
    assert run_one(folder, SETTINGS, {}, work) == 'skipped'

    text = (folder / 'result.json').read_text()
    (folder / 'result.json').write_text(text[::-1])  # of the same size
    (folder / 'half').unlink()
    named = r'sft: expected the outputs of stage sft, found that half is missing, result\.json was changed; --rerun=sft'
    with pytest.raises(WorkdirError, match=named):
        run_one(folder, SETTINGS, {}, work)
    with pytest.raises(WorkdirError, match=named):
        run_one(tmp_path / 'other' / 'rl', SETTINGS, {'simulator': folder}, work)
    assert work.calls == 1
    assert run_one(folder, SETTINGS, {}, work, rerun=True) == 'finished'
    assert not (folder / '.ipynb_checkpoints').exists()


def test_unchanged_outputs_are_hashed_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_one(tmp_path / 'sft', SETTINGS, {}, Work())
    monkeypatch.setattr(stage_files, '_hash_file', lambda path: pytest.fail(f'{path} was hashed again'))
    assert run_one(tmp_path / 'sft', SETTINGS, {}, Work()) == 'skipped'


@pytest.mark.parametrize(
    ('name', 'field', 'message'),
    [
        ('stage.json', 'settings', r'stage\.json: expected settings and inputs, found inputs'),
        ('done.json', 'outputs', r'done\.json: expected outputs, found none: it is of another version of simrl'),
    ],
)
def test_damaged_records(tmp_path: pathlib.Path, name: str, field: str, message: str) -> None:
    run_one(tmp_path / 'sft', SETTINGS, {}, Work())
    path = tmp_path / 'sft' / name
    path.write_text(json.dumps({key: x for key, x in json.loads(path.read_text()).items() if key != field}))
    with pytest.raises(WorkdirError, match=message):
        run_one(tmp_path / 'sft', SETTINGS, {}, Work())
    path.write_text('[]')
    with pytest.raises(WorkdirError, match='expected a JSON object, found list'):
        run_one(tmp_path / 'sft', SETTINGS, {}, Work())


def test_scratch_and_half_written_records_are_no_outputs(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / 'sft'

    def work(where: pathlib.Path) -> None:
        for name in ('checkpoints', 'params'):
            (where / name).mkdir()
            (where / name / 'checkpoints').write_text('large')

    run_one(folder, SETTINGS, {}, work)
    assert not (folder / 'checkpoints').exists()
    assert set(json.loads((folder / 'done.json').read_text())['outputs']) == {'params/checkpoints'}
    (folder / 'checkpoints').mkdir()  # as after a kill before it was deleted
    assert run_one(folder, SETTINGS, {}, work) == 'skipped'
    assert not (folder / 'checkpoints').exists()


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
    """In a run and in a rerun, after which nothing else is changed either."""
    plan = five_stages(tmp_path)
    run(tmp_path, plan)
    for path in (tmp_path / 'evaluate').iterdir():
        path.unlink()
    (tmp_path / 'evaluate' / 'thesis.tex').write_text('years of work')
    before = files(tmp_path)
    for rerun in ([], [], ['rl']):  # the first leaves a lock
        with pytest.raises(WorkdirError, match=r'an empty folder or a stage \(stage\.json\), found thesis\.tex'):
            run(tmp_path, plan, *rerun)
    assert files(tmp_path) == before


@pytest.mark.parametrize('locked', ['rl/a/seed-0', 'evaluate'])
def test_a_rerun_of_a_locked_stage_changes_nothing(tmp_path: pathlib.Path, locked: str) -> None:
    run(tmp_path, five_stages(tmp_path))
    before, changed = files(tmp_path), five_stages(tmp_path, {'rl': {'steps': 20}})
    with stage_files.lock(tmp_path / locked, shared=True), pytest.raises(LockedError, match=f'{locked}: another proce'):
        run(tmp_path, changed, 'rl', config={'steps': 20})
    assert files(tmp_path) == before
    run(tmp_path, five_stages(tmp_path))


@pytest.mark.parametrize('moment', [0, 1, 2, 3, 5, 15])
def test_a_rerun_that_is_killed_is_resumed_by_the_same_command(tmp_path, monkeypatch, moment: int) -> None:
    """Killed before one of the 16 deletions of files of four stages."""

    def check_empty(folder: pathlib.Path) -> None:
        assert {path.name for path in folder.iterdir()} == {'stage.json', 'stage.lock'}

    run(tmp_path, five_stages(tmp_path))
    changed = five_stages(tmp_path, {'rl': {'steps': 20}}, rl=check_empty, evaluate=check_empty, summary=check_empty)
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
            run(tmp_path, changed, 'rl', config={'steps': 20})
    assert not stages.is_done(tmp_path / 'summary')
    ran = run(tmp_path, changed, 'rl', config={'steps': 20})
    assert [name for name, kind in ran.items() if kind == 'finished'] == stages_to_rerun(tmp_path, changed, ['rl'])
    assert set(run(tmp_path, changed, config={'steps': 20}).values()) == {'skipped'}


RUN_SLOWLY = """
import pathlib, sys, time
from simrl.run import stages

def work(folder):
    print('running', flush=True)
    time.sleep(60)

stages.run_stages(pathlib.Path(sys.argv[1]), [stages.Stage('sft', {}, {}, work)])
"""


def test_a_stage_that_another_process_runs(tmp_path: pathlib.Path) -> None:
    work, other = Work(), Work()
    plan = [
        Stage('sft', {}, {}, work),
        Stage('other', {}, {}, other),
        Stage('rl', {}, {'sft': tmp_path / 'sft'}, work),
    ]
    open_workdir(tmp_path, {})
    process = subprocess.Popen([sys.executable, '-c', RUN_SLOWLY, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    events = list[Event]()

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind == 'waiting':
            process.send_signal(signal.SIGKILL)  # which releases the lock

    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(3)] == ['\n', '== sft\n', 'running\n']
        holder = f'process {process.pid} on '
        for rerun in ([], ['sft']):
            with pytest.raises(LockedError, match=f'sft: another process uses this stage .{holder}'):
                run(tmp_path, plan, *rerun)
        assert (work.calls, other.calls) == (0, 0)
        before = files(tmp_path)
        planned = stages.plan_of(tmp_path, plan)
        assert [(stage.state, stage.reason.startswith(holder)) for stage in planned] == [
            ('running', True),
            ('missing', False),
            ('waits', False),
        ]
        assert re.search(
            r'\nrunning now \(process .*\): sft\nto run now: other\nto run later: rl$', stages.plan_text(planned)
        )
        assert files(tmp_path) == before
        run_stages(tmp_path, plan, if_locked='wait', on_event=on_event)
    finally:
        process.kill()
        process.wait()
    happened = [(event.stage, event.kind) for event in events if event.kind != 'started']
    assert happened == [('other', 'finished'), ('sft', 'waiting'), ('sft', 'finished'), ('rl', 'finished')]
    assert events[2].holder.startswith(holder)


@pytest.mark.parametrize(
    ('names', 'dependent', 'needed'),
    [
        (['rl'], ['rl/a/seed-0', 'rl/b/seed-0', 'evaluate', 'summary'], ['rl/a/seed-0', 'rl/b/seed-0']),
        (['rl/a/'], ['rl/a/seed-0', 'evaluate', 'summary'], ['rl/a/seed-0']),
        (['summary', 'rl/b/seed-0'], ['rl/b/seed-0', 'summary'], ['rl/a/seed-0', 'rl/b/seed-0', 'evaluate', 'summary']),
        (['other'], ['other'], ['other']),
    ],
)
def test_stages_to_rerun_and_to_select(tmp_path: pathlib.Path, names, dependent, needed) -> None:
    plan = five_stages(tmp_path)
    chosen = select(tmp_path, plan, names)
    assert [stage.name for stage in chosen] == needed
    assert run(tmp_path, chosen) == dict.fromkeys(needed, 'finished')
    assert run(tmp_path, plan) == {stage.name: 'skipped' if stage in chosen else 'finished' for stage in plan}
    assert stages_to_rerun(tmp_path, plan, names) == dependent
    ran = run(tmp_path, plan, *names)
    assert [name for name, kind in ran.items() if kind == 'finished'] == dependent


@pytest.mark.parametrize('name', ['evaluat', 'rl/a/seed', 'seed-0'])
def test_unknown_stages_to_rerun_and_to_select(tmp_path: pathlib.Path, name: str) -> None:
    for flag, choose in (('--rerun', stages_to_rerun), ('--only', select)):
        message = f'^{flag}: expected names of stages or of their folders, found {name}; there are rl/a, rl/b, .*other$'
        with pytest.raises(WorkdirError, match=message):
            choose(tmp_path, five_stages(tmp_path), ['other', name])


def test_a_rerun_that_was_killed_is_resumed_by_the_command_without_it(tmp_path: pathlib.Path) -> None:
    arm, evaluate = Work(), Work()
    plan = five_stages(tmp_path, rl=arm, evaluate=evaluate)
    run(tmp_path, plan)
    evaluate.fails = True
    with pytest.raises(KeyError):
        run(tmp_path, plan, 'rl/a')
    evaluate.fails = False
    run(tmp_path, plan)
    assert (arm.calls, evaluate.calls) == (3, 3)  # two arms and a rerun; first, failed, resumed


def test_stages_out_of_order_or_inside_each_other(tmp_path: pathlib.Path) -> None:
    plan = five_stages(tmp_path)
    with pytest.raises(WorkdirError, match=r'summary: expected its inputs in .* to be earlier stages, found evaluate'):
        open_workdir(tmp_path, {}, [*plan[:2], *plan[:1:-1]])
    for name in ('rl/a', 'other', 'other/deeper'):
        with pytest.raises(ValueError, match=f'{name}: expected a folder of its own'):
            run_stages(tmp_path, [*plan, Stage(name, {}, {}, Work())])
    assert not list(tmp_path.iterdir())


def test_a_stage_that_is_read_is_not_emptied_but_read_by_others(tmp_path: pathlib.Path) -> None:
    arm, *_ = five_stages(tmp_path)

    def reads(folder: pathlib.Path) -> None:
        with pytest.raises(LockedError, match=r'stage .an unknown process, maybe only a reader.; wait for it, or stop'):
            open_workdir(tmp_path, {}, rerun=[arm.name])
        assert run(tmp_path, [arm]) == {arm.name: 'skipped'}  # as a command of other arms would

    run(tmp_path, [arm, Stage('reads', {}, {'arm': tmp_path / arm.name}, reads)])
    open_workdir(tmp_path, {}, rerun=[arm.name])
    assert not stages.is_done(tmp_path / arm.name)


def test_an_input_that_was_rerun_meanwhile_is_not_read_again(tmp_path: pathlib.Path) -> None:
    """What this process read of it may still be in its memory, while its folder holds something else."""
    first, last = Stage('first', {}, {}, Work()), Work()
    reads = {'first': tmp_path / 'first'}
    open_workdir(tmp_path, {})

    def on_event(event: Event) -> None:
        if event == Event('second', 'finished', event.seconds):  # as another process might
            run(tmp_path, [first], 'first')

    with pytest.raises(WorkdirError, match='first: another process reran this stage after it was read here'):
        run_stages(
            tmp_path, [first, Stage('second', {}, reads, Work()), Stage('last', {}, reads, last)], on_event=on_event
        )
    assert last.calls == 0
    run(tmp_path, [first, Stage('last', {}, reads, last)])
    assert last.calls == 1


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, 'flock', flock)
    for shared in (False, True):
        with (
            pytest.raises(
                WorkdirError, match=rf'^{tmp_path}: its file system supports no locks \(flock: Operation not'
            ),
            stage_files.lock(tmp_path, shared=shared),
        ):
            pass


def test_a_full_disk_is_named(tmp_path) -> None:
    new = tmp_path / f'a.json.{os.getpid()}.new'
    new.symlink_to('/dev/full')
    with pytest.raises(OSError, match=rf'could not write {tmp_path}/a\.json: No space left on device'):
        stage_files.write_json(tmp_path / 'a.json', {})


def test_a_read_only_copy_without_a_lock_is_read(tmp_path, monkeypatch) -> None:
    run_one(tmp_path / 'copy', SETTINGS, {}, Work())
    (tmp_path / 'copy' / 'stage.lock').unlink()
    monkeypatch.setattr(os, 'access', lambda path, _: path != tmp_path / 'copy')
    assert run_one(tmp_path / 'run' / 'rl', SETTINGS, {'copy': tmp_path / 'copy'}, Work()) == 'finished'
    assert not (tmp_path / 'copy' / 'stage.lock').exists()


WRITE_RESULTS = """
import json, os, pathlib, sys, time
from simrl.run import stage_files

results, value = pathlib.Path(sys.argv[1]), [os.getpid()] * 20000
for _ in range(int(sys.argv[2])):
    with stage_files.wait_for_lock(results):
        os.close(os.open(results.parent / 'busy', os.O_CREAT | os.O_EXCL))  # fails where another is in here
        for name in 'abcde':
            stage_files.write_json(results / f'{name}.json', value)
            print(name, flush=True)
        assert all(json.loads((results / f'{name}.json').read_text()) == value for name in 'abcde')
        (results.parent / 'busy').unlink()
"""


def write_results(results: pathlib.Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, '-c', WRITE_RESULTS, str(results), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_write_results_take_turns(tmp_path: pathlib.Path) -> None:
    processes = [write_results(tmp_path / 'results', 3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(''.join(line for line in text.split() if len(line) == 1) == 3 * 'abcde' for text in outputs)


def test_a_killed_writer_leaves_whole_files(tmp_path: pathlib.Path) -> None:
    results = tmp_path / 'results'
    for lines in (1, 7, 8, 14, 20):
        process = write_results(results, 1000)
        assert process.stdout is not None
        assert all(process.stdout.readline() for _ in range(lines))
        process.kill()
        process.communicate()
        for path in results.glob('*.json'):
            assert len(set(json.loads(path.read_text()))) == 1
        (tmp_path / 'busy').unlink(missing_ok=True)
    (results / 'a.json.1.new').write_text('[1, ')  # as after a kill before it was renamed
    with stage_files.wait_for_lock(results):
        assert {path.name for path in results.iterdir()} == {'stage.lock', *(f'{name}.json' for name in 'abcde')}


def test_stages_of_other_settings_are_refused_at_once_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    workdir, other = tmp_path / 'run', Work()
    other.fails = True
    with pytest.raises(KeyError):
        run(workdir, five_stages(workdir, other=other), config={'arms': ['a', 'b']})
    before = files(workdir)
    changes = {'rl': {'steps': 20}, 'summary': {'steps': 20}, 'other': {'steps': 5, 'learning_rate': 1}}
    changed = five_stages(workdir, changes, other=other)
    for rerun in ([], ['evaluate']):
        with pytest.raises(WorkdirError) as error:
            open_workdir(workdir, {'arms': ['a']}, changed, rerun=rerun)
        assert str(error.value) == (
            f'{workdir}: stages were started with other settings: rl/a/seed-0, rl/b/seed-0, summary '
            '(sft.steps: 10 -> 20); other (sft.learning_rate: 0.1 -> 1; sft.steps: 10 -> 5). Rerun them '
            '(--rerun=rl,other), or use another workdir'  # summary depends on the first
        )
    planned = stages.plan_of(workdir, changed)
    assert [(stage.state, stage.reason) for stage in planned] == [
        ('refused', 'other settings: sft.steps: 10 -> 20'),
        ('refused', 'other settings: sft.steps: 10 -> 20'),
        ('waits', 'rl/a/seed-0'),
        ('refused', 'other settings: sft.steps: 10 -> 20'),
        ('refused', 'other settings: sft.learning_rate: 0.1 -> 1; sft.steps: 10 -> 5'),
    ]
    assert '\nrefused (other settings: sft.steps: 10 -> 20): rl/a/seed-0, rl/b/seed-0, summary\n' in stages.plan_text(
        planned
    )
    assert files(workdir) == before

    rerun = stages_to_rerun(workdir, changed, ['rl/a/seed-0', 'rl/b/seed-0', 'other'])
    states = [stage.state for stage in stages.plan_of(workdir, changed, rerun=rerun)]
    assert states == ['missing', 'missing', 'waits', 'waits', 'missing']
    open_workdir(workdir, {'arms': ['a']}, changed, rerun=rerun)
    other.fails = False
    run_stages(workdir, changed)
    assert other.calls == 2
    assert config_of(workdir) == {'arms': ['a']}


def many_stages(workdir: pathlib.Path, steps: int = 10) -> list[Stage]:
    """Four arms of eight seeds, all but one arm with these steps, and a measurement of each."""
    names = [f'{arm}/seed-{seed}' for seed in range(8) for arm in 'abcd']
    trained = [Stage(f'rl/{name}', {'steps': 10 if name[0] == 'd' else steps}, {}, Work()) for name in names]
    return trained + [Stage(f'people/{name}', {}, {'rl': workdir / 'rl' / name}, Work()) for name in names]


def test_a_refusal_of_many_stages_is_short_and_enough(tmp_path) -> None:
    plan, changed = many_stages(tmp_path), many_stages(tmp_path, 20)
    run(tmp_path, plan)
    with pytest.raises(WorkdirError) as error:
        open_workdir(tmp_path, {}, changed)
    assert str(error.value).removeprefix(f'{tmp_path}: ') == (
        'stages were started with other settings: rl/a/seed-0, rl/b/seed-0, rl/c/seed-0, rl/a/seed-1, rl/b/seed-1 and '
        '19 more (steps: 10 -> 20). Rerun them (--rerun=rl/a,rl/b,rl/c), or use another workdir'
    )
    ran = run(tmp_path, changed, 'rl/a', 'rl/b', 'rl/c')
    assert {name for name, kind in ran.items() if kind == 'finished'} == {s.name for s in plan if '/d/' not in s.name}


def test_stages_that_are_new_or_of_other_arms_are_not_compared(tmp_path: pathlib.Path) -> None:
    both = five_stages(tmp_path)
    run(tmp_path, [stage for stage in both if stage.name != 'rl/b/seed-0'])
    before = {name: content for name, content in files(tmp_path).items() if name.endswith('result.json')}
    run(tmp_path, both)  # an arm more
    changed = five_stages(tmp_path, {'rl': {'steps': 20}})
    open_workdir(tmp_path, {}, [stage for stage in changed if stage.name in ('other',)])
    assert before.items() <= files(tmp_path).items()
    for name in ('rl/a/seed-0', 'rl/b/seed-0'):  # as after a kill while they were emptied
        (tmp_path / name / 'stage.json').rename(tmp_path / name / 'stage.emptying')
    open_workdir(tmp_path, {}, changed)


def test_a_failing_check_is_raised_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    def check() -> None:
        raise ConfigError('config.rl.steps: expected at least 1, found 0')

    workdir, work = tmp_path / 'run', Work()
    plan = [
        Stage('sft', {}, {}, work),
        Stage('rl', {}, {'sft': workdir / 'sft'}, work, check),
        Stage('b', {}, {}, work),
    ]
    with pytest.raises(ConfigError, match=r'config\.rl\.steps'):
        run(workdir, plan)
    assert [(stage.name, stage.state, stage.inputs) for stage in stages.plan_of(workdir, plan)] == [
        ('sft', 'missing', ()),
        ('rl', 'refused', ('sft',)),
        ('b', 'missing', ()),
    ]
    assert not workdir.exists()
    run(workdir, select(workdir, plan, ['sft']))
    assert stages.plan_text(stages.plan_of(workdir, plan)).splitlines() == [
        'stage  state     seconds  reads',
        'sft    done            0',
        'rl     refused            sft',
        'b      missing',
        '',
        'done: 1 of 3 stages, 0 s',
        'refused (config.rl.steps: expected at least 1, found 0): rl',
        'to run now: b',
    ]
    with pytest.raises(ConfigError):
        run(workdir, plan)
    assert work.calls == 1


def test_the_plan_of_a_run_at_every_state(tmp_path: pathlib.Path, data: pathlib.Path) -> None:
    workdir, evaluate = tmp_path / 'run', Work()
    plan = five_stages(workdir, evaluate=evaluate)
    plan[0] = Stage(plan[0].name, SETTINGS, {'data': data}, Work())

    def states() -> list[str]:
        before = files(tmp_path)
        planned = stages.plan_of(workdir, plan)
        assert files(tmp_path) == before
        assert [stage.seconds is not None for stage in planned] == [stage.state == 'done' for stage in planned]
        assert planned[0].inputs == (str(data),)
        return [stage.state for stage in planned]

    assert states() == ['missing', 'missing', 'waits', 'waits', 'missing']
    assert not workdir.exists()
    evaluate.fails = True
    with pytest.raises(KeyError):
        run(workdir, plan)
    assert states() == ['done', 'done', 'started', 'waits', 'missing']
    text = stages.plan_text(stages.plan_of(workdir, plan))
    assert text.endswith('done: 2 of 5 stages, 0 s\nto resume now: evaluate\nto run now: other\nto run later: summary')
    evaluate.fails = False
    run(workdir, plan)
    assert states() == ['done'] * 5
    assert stages.plan_text(stages.plan_of(workdir, plan)).endswith('done: 5 of 5 stages, 0 s')
    data.write_text('other')
    (workdir / 'rl/b/seed-0/result.json').unlink()
    assert states() == ['refused', 'refused', 'waits', 'waits', 'done']
    reasons = [stage.reason for stage in stages.plan_of(workdir, plan)]
    assert 'input data: ' in reasons[0]
    assert 'result.json is missing' in reasons[1]


def config_of(workdir: pathlib.Path) -> dict:
    """config.json without format and version."""
    config = json.loads((workdir / 'config.json').read_text())
    assert config.pop('format') == stages.FORMAT
    assert config.pop('version') != '0.0.1'
    return config


def test_the_workdir_of_another_config(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / 'run'
    first = {'sft': {'steps': 1}, 'logging': {'log_every': 1}, 'arms': ['a']}
    for _ in range(2):
        open_workdir(workdir, first)
        assert config_of(workdir) == first

    second = {'sft': {'steps': 2}, 'logging': {'log_every': 5}, 'arms': ['a', 'b']}
    for rerun in ([], ['sft']):
        with pytest.raises(WorkdirError, match=r'run: is the run of another config: sft\.steps: 1 -> 2\. Use'):
            open_workdir(workdir, second, fixed=('sft',), rerun=rerun)
        assert config_of(workdir) == first

    open_workdir(workdir, second, fixed=('scene',))  # neither config has one
    assert config_of(workdir) == second
    (workdir / 'config.json').write_text(json.dumps({**second, 'format': stages.FORMAT, 'version': '0.0.1'}))
    open_workdir(workdir, second)  # of an older version, but of this format
    assert config_of(workdir) == second


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('config.json', '{"arms": []}', r'expected a run of format 4, found another\. Use another workdir, or resume'),
        ('config.json', '{"format": 3, "version": "0.9"}', r'format 4, found 3\. .* \(simrl 0\.9\)'),
        ('config.json', '{"half', r'config\.json: expected JSON'),
        ('photo.png', '', r'expected an empty folder or a run \(config\.json\), found photo\.png'),
    ],
)
def test_the_workdir_of_something_else(tmp_path: pathlib.Path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    for refuse in (
        lambda: open_workdir(tmp_path, {}),
        lambda: open_workdir(tmp_path, {}, rerun=['sft']),
        lambda: stages.plan_of(tmp_path, []),
    ):
        with pytest.raises(WorkdirError, match=message):
            refuse()
    assert [path.name for path in tmp_path.iterdir()] == [name]
