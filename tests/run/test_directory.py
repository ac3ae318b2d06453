"""A run directory is opened, planned and rerun, or refused before anything is written."""

import json
import pathlib

import pytest

from simrl.run import directory, stage_files, stages
from simrl.run.config import ConfigError
from simrl.run.directory import open_workdir
from simrl.run.stages import LockedError, Stage, WorkdirError, run_stages, select, stages_to_rerun
from tests.run.five_stages import SETTINGS, Work, files, five_stages, run


class Killed(BaseException):
    """Stands for the kill of the process."""


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / 'data.jsonl'
    path.write_text('{}\n')
    return path


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
    planned = directory.plan_of(workdir, {}, changed)
    assert [(stage.state, stage.reason) for stage in planned] == [
        ('refused', 'other settings: sft.steps: 10 -> 20'),
        ('refused', 'other settings: sft.steps: 10 -> 20'),
        ('waits', 'rl/a/seed-0'),
        ('refused', 'other settings: sft.steps: 10 -> 20'),
        ('refused', 'other settings: sft.learning_rate: 0.1 -> 1; sft.steps: 10 -> 5'),
    ]
    assert (
        '\nrefused (other settings: sft.steps: 10 -> 20): rl/a/seed-0, rl/b/seed-0, summary\n'
        in directory.plan_text(planned)
    )
    assert files(workdir) == before

    rerun = stages_to_rerun(workdir, changed, ['rl/a/seed-0', 'rl/b/seed-0', 'other'])
    states = [stage.state for stage in directory.plan_of(workdir, {}, changed, rerun=rerun)]
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
    for arm in 'ab':  # the others are in the way of the shorter name, though they are not selected
        with pytest.raises(WorkdirError, match=rf'--rerun=rl/{arm}\)'):
            open_workdir(tmp_path, {}, [stage for stage in changed if stage.name.startswith(f'rl/{arm}/')])
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


def test_a_plan_asks_a_check_once_however_many_stages_share_it(tmp_path: pathlib.Path) -> None:
    asked = []

    def check() -> None:
        asked.append(None)
        raise ConfigError('config.arms: none')

    plan = [Stage(name, {}, {}, Work(), check) for name in ('a', 'b', 'c')]
    assert {(stage.state, stage.reason) for stage in directory.plan_of(tmp_path / 'run', {}, plan)} == {
        ('refused', 'config.arms: none')
    }
    assert len(asked) == 1


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
    assert [(stage.name, stage.state, stage.inputs) for stage in directory.plan_of(workdir, {}, plan)] == [
        ('sft', 'missing', ()),
        ('rl', 'refused', ('sft',)),
        ('b', 'missing', ()),
    ]
    assert not workdir.exists()
    run(workdir, select(workdir, plan, ['sft']))
    assert directory.plan_text(directory.plan_of(workdir, {}, plan)).splitlines() == [
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
        planned = directory.plan_of(workdir, {}, plan)
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
    text = directory.plan_text(directory.plan_of(workdir, {}, plan))
    assert text.endswith('done: 2 of 5 stages, 0 s\nto resume now: evaluate\nto run now: other\nto run later: summary')
    evaluate.fails = False
    run(workdir, plan)
    assert states() == ['done'] * 5
    assert directory.plan_text(directory.plan_of(workdir, {}, plan)).endswith('done: 5 of 5 stages, 0 s')
    data.write_text('other')
    (workdir / 'rl/b/seed-0/result.json').unlink()
    assert states() == ['refused', 'refused', 'waits', 'waits', 'done']
    reasons = [stage.reason for stage in directory.plan_of(workdir, {}, plan)]
    assert 'input data: ' in reasons[0]
    assert 'result.json is missing' in reasons[1]


def test_hidden_files_are_no_run_and_no_stage(tmp_path: pathlib.Path) -> None:
    """As file managers leave them in folders that were looked at."""
    plan = five_stages(tmp_path)
    (tmp_path / '.DS_Store').write_text('seen')
    open_workdir(tmp_path, {}, plan)
    for folder in ('rl', 'other'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / '.DS_Store').write_text('seen')
    assert set(run(tmp_path, plan).values()) == {'finished'}


def test_the_folder_of_a_stage_may_be_a_link(tmp_path: pathlib.Path) -> None:
    """Moved to another disk; what depends on the stage is rerun with it, and --only knows what it needs."""
    workdir, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'
    plan = five_stages(workdir)
    run(workdir, plan)
    for folder in ('rl', 'evaluate'):
        (workdir / folder).rename(elsewhere)
        (workdir / folder).symlink_to(elsewhere, target_is_directory=True)
        elsewhere = tmp_path / 'further'
    assert set(run(workdir, plan).values()) == {'skipped'}
    assert stages_to_rerun(workdir, plan, ['rl/a']) == ['rl/a/seed-0', 'evaluate', 'summary']
    assert [stage.name for stage in select(workdir, plan, ['summary'])] == ['rl/a/seed-0', 'evaluate', 'summary']
    assert directory.plan_of(workdir, {}, plan)[3].inputs == ('evaluate',)
    ran = run(workdir, plan, 'rl/a')
    assert [name for name, kind in ran.items() if kind == 'finished'] == ['rl/a/seed-0', 'evaluate', 'summary']
    assert (workdir / 'rl').is_symlink()


def config_of(workdir: pathlib.Path) -> dict:
    """config.json without format and version."""
    config = json.loads((workdir / 'config.json').read_text())
    assert config.pop('format') == directory.FORMAT
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
        with pytest.raises(WorkdirError, match=r'run: is the run of another config: sft\.steps: 1 -> 2\. Use'):
            directory.plan_of(workdir, second, [], fixed=('sft',), rerun=rerun)
        assert config_of(workdir) == first

    open_workdir(workdir, second, fixed=('scene',))  # neither config has one
    assert config_of(workdir) == second
    (workdir / 'config.json').write_text(json.dumps({**second, 'format': directory.FORMAT, 'version': '0.0.1'}))
    open_workdir(workdir, second)  # of an older version, but of this format
    assert config_of(workdir) == second


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('config.json', '{"arms": []}', r'expected a run of format 5, found another\. Use another workdir, or resume'),
        ('config.json', '{"format": 3, "version": "0.9"}', r'format 5, found 3\. .* \(simrl 0\.9\)'),
        ('config.json', '{"half', r'config\.json: expected JSON'),
        ('photo.png', '', r'expected an empty folder or a run \(config\.json\), found photo\.png'),
    ],
)
def test_the_workdir_of_something_else(tmp_path: pathlib.Path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    for refuse in (
        lambda: open_workdir(tmp_path, {}),
        lambda: open_workdir(tmp_path, {}, rerun=['sft']),
        lambda: directory.plan_of(tmp_path, {}, []),
    ):
        with pytest.raises(WorkdirError, match=message):
            refuse()
    assert [path.name for path in tmp_path.iterdir()] == [name]
