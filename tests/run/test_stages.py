"""Stages run once, resume after a kill, and refuse what does not fit them."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from simrl.run import directory, stages
from simrl.run.directory import open_workdir
from simrl.run.stages import Event, LockedError, Stage, WorkdirError, run_stages, select, stages_to_rerun
from tests.run.five_stages import SETTINGS, Work, files, five_stages, run, run_one


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
        with pytest.raises(LockedError, match=f'sft: another process uses this stage .{holder}'):
            run(tmp_path, plan, 'sft')
        assert (work.calls, other.calls) == (0, 0)
        before = files(tmp_path)
        planned = directory.plan_of(tmp_path, {}, plan)
        assert [(stage.state, stage.reason.startswith(holder)) for stage in planned] == [
            ('running', True),
            ('missing', False),
            ('waits', False),
        ]
        assert re.search(
            r'\nrunning now \(process .*\): sft\nto run now: other\nto run later: rl$', directory.plan_text(planned)
        )
        assert files(tmp_path) == before
        run_stages(tmp_path, plan, on_event=on_event)
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


def test_a_read_only_copy_without_a_lock_is_read(tmp_path, monkeypatch) -> None:
    run_one(tmp_path / 'copy', SETTINGS, {}, Work())
    (tmp_path / 'copy' / 'stage.lock').unlink()
    monkeypatch.setattr(os, 'access', lambda path, _: path != tmp_path / 'copy')
    assert run_one(tmp_path / 'run' / 'rl', SETTINGS, {'copy': tmp_path / 'copy'}, Work()) == 'finished'
    assert not (tmp_path / 'copy' / 'stage.lock').exists()
