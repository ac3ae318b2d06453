"""The benchmark: its limits by hand, its checks, and our side of every case on a tiny model, without peers."""

import ast
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

from simrl.conversations.chat import Chat
from simrl.models.transformer import TransformerConfig
from simrl.run import memory, workers
from tools.benchmark import __main__ as tool
from tools.benchmark import environment, inputs, limits, measure, models, ours, plan, report
from tools.benchmark.job import CASES, Job
from tools.benchmark.limits import Limit, Phase, Rates
from tools.benchmark.measure import OURS, Disagreement, SideResult
from tools.benchmark.plan import Size
from tools.benchmark.protocol import Bench, Finished, SideError

FOLDER = pathlib.Path(tool.__file__).parent
# 2 layers, 4 query and 2 key/value heads of 4, width 8, MLP 16, 100 ids.
CONFIG = TransformerConfig(
    vocab_size=100,
    model_dim=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=16,
    max_positions=64,
    tied_embedding=True,
)
LAYERS = 2 * (8 * 4 * (4 + 2 + 2 + 4) + 3 * 8 * 16)  # query, key, value, output; gate, up, down: 1,536
HEAD = 100 * 8
SIZES = {'conversations': Size(2, 96, 2)}  # of the runs below; all others are 4 x 64


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TransformerConfig, Chat]:
    folder = tmp_path_factory.mktemp('benchmark') / 'model'
    return folder, *models.prepare('random:tiny', folder, 'float32')


def job_of(case: str, folder: pathlib.Path, model: pathlib.Path, chat: Chat) -> Job:
    size = SIZES.get(case, Size(4, 64))
    new_tokens = inputs.message_tokens(chat, size.context, size.turns) if case == 'conversations' else 16
    options = tool.parse([f'--output={folder}', '--threads=1'])
    return tool.job_of(options, case, size, new_tokens, plan.samples_of(case, size.batch, 2), model, folder)


# Limits.


def test_weights_are_those_of_the_matrices():
    weights = limits.weights_of(CONFIG)
    assert (weights.layers, weights.head, weights.stored) == (LAYERS, HEAD, LAYERS + HEAD)
    assert weights.cache == 2 * 2 * 2 * 4
    assert weights.attention == 4 * 2 * 4 * 4
    assert limits.weights_of(dataclasses.replace(CONFIG, tied_embedding=False)).stored == LAYERS + 2 * HEAD


def test_weights_of_a_published_model():
    """Qwen2.5-1.5B has 1.54 billion parameters, 1.31 without its embedding."""
    weights = limits.weights_of(models.SHAPES['qwen2.5-1.5b'])
    assert weights.stored == pytest.approx(1.54e9, rel=0.01)
    assert weights.layers == pytest.approx(1.31e9, rel=0.01)


def test_decoding_reads_weights_once_and_the_cache_of_every_row():
    phases = limits.decoding(limits.weights_of(CONFIG), rows=3, cached=10, steps=2, item=2)
    first, second = phases
    assert first.bytes == 2 * (LAYERS + HEAD) + 3 * 10 * 32 * 2
    assert second.bytes - first.bytes == 3 * 32 * 2
    assert first.flops == 3 * (2 * (LAYERS + HEAD) + 128 * 10)


def test_prefilling_is_two_operations_a_token_and_weight():
    phase = limits.prefilling(limits.weights_of(CONFIG), rows=3, cached=5, tokens=2, item=4)
    assert phase.flops == 3 * (2 * LAYERS * 2 + 128 * (6 + 7))  # the first sees 6 tokens, itself included
    assert phase.bytes == 4 * LAYERS + 3 * 7 * 32 * 4


def test_gradients_are_six_operations_a_token_and_weight():
    gradient, optimizer = limits.gradient_step(limits.weights_of(CONFIG), tokens=50, trained=20, item=4)
    assert gradient.flops == 6 * (LAYERS * 50 + HEAD * 20)
    assert optimizer == Phase(0, 32 * (LAYERS + HEAD))


def test_a_phase_takes_what_its_slower_part_does():
    rates = Rates(flops=100.0, bandwidth=10.0)
    limit = limits.limit_of([Phase(1000, 10), Phase(100, 30)], rates)
    assert limit.seconds == 10 + 3
    assert limit.memory_share == pytest.approx(3 / 13)
    assert limit.by == 'matrix products'
    assert limits.limit_of([Phase(100, 30)], rates).by == 'bandwidth'


def test_a_conversation_feeds_every_token_once(tmp_path, model):
    """Two turns: the assistant speaks first and last, the user in between, each with a cache of its own."""
    job = dataclasses.replace(job_of('conversations', tmp_path, *model[::2]), batch=1, new_tokens=5)
    counts = inputs.Counts(prompt=20, own_header=3, partner_header=4)
    phases = plan.phases(job, counts, limits.weights_of(CONFIG))
    weights = limits.weights_of(CONFIG)
    # Of each message: what its sender has cached, the row when its first token is sampled, and what is fed in between,
    # less the last token, which makes the first logits. The row is 20 + 3, then + 5 + 1 + 4, then + 5 + 1 + 3.
    expected = [(0, 23, 22), (0, 33, 32), (23 + 5 - 1, 42, 14)]
    assert len(phases) == 3 * (1 + 5)
    for i, (cached, length, fed) in enumerate(expected):
        assert phases[6 * i] == limits.prefilling(weights, rows=1, cached=cached, tokens=fed, item=4)
        assert phases[6 * i + 1] == limits.decoding(weights, rows=1, cached=length, steps=1, item=4)[0]


# Sizes and memory.


def test_sizes_are_the_defaults_or_what_was_asked_for():
    defaults = [Size(16, 256), Size(64, 256)]
    assert plan.sizes_of('sampling', defaults, None, None, None, []) == defaults
    assert plan.sizes_of('sampling', defaults, [2, 4], [32], [7], []) == [Size(2, 32), Size(4, 32)]
    assert plan.sizes_of('conversations', [Size(8, 512, 5)], None, None, [1, 2], []) == [
        Size(8, 512, 1),
        Size(8, 512, 2),
    ]


def test_a_sweep_varies_one_size_at_a_time():
    swept = plan.sizes_of('conversations', [Size(8, 500, 5)], None, None, None, ['batch', 'turns'])
    assert swept == [
        Size(8, 500, 5),
        *(Size(batch, 500, 5) for batch in (2, 4, 16)),
        *(Size(8, 100 * turns, turns) for turns in (1, 2, 10)),
    ]
    assert len(plan.sizes_of('sft', [Size(4, 256)], None, None, None, ['turns'])) == 1


@pytest.mark.parametrize('default', [plan.CPU_SIZES, plan.GPU_SIZES])
def test_every_case_has_sizes_and_peers(default):
    assert set(default) == set(plan.PEERS) == set(CASES)


def test_the_estimate_of_memory_by_hand():
    decoding = plan.memory(CONFIG, 'sampling', Size(3, 10), 'bfloat16', remat='none', ours=True)
    assert decoding == limits.PROCESS_BYTES + 2 * (LAYERS + HEAD) + 2 * 3 * 10 * 32 * 2 + 3 * 3 * 100 * 4
    split = plan.memory(CONFIG, 'sampling', Size(3, 10), 'bfloat16', remat='none', ours=True, devices=3)
    assert split == decoding + 2 * 2 * (LAYERS + HEAD)
    talking = plan.memory(CONFIG, 'conversations', Size(3, 10, 2), 'bfloat16', remat='none', ours=True)
    assert talking == decoding + 2 * 3 * 10 * 32 * 2  # a second view
    training = plan.memory(CONFIG, 'sft', Size(3, 10), 'float32', remat='none', ours=False)
    kept = 2 * (6 * 8 + 4 * 16 + 4 * 16 + 2 * 4 * 10)
    logits = 3 * 4 * 100
    assert training == limits.PROCESS_BYTES + 16 * (LAYERS + HEAD) + 30 * (kept * 4 + logits)
    given = 8 + 4 * 4 + 2 * 2 * 4 + 8 + 2 * 16 + 8  # x, query, key and value, output, gate and up, down
    found = {
        (remat, ours): plan.memory(CONFIG, 'sft', Size(3, 10), 'float32', remat=remat, ours=ours) - training
        for remat in ('dots', 'full')
        for ours in (True, False)
    }
    assert found['full', True] == found['full', False] == 30 * 4 * (kept // 2 + 2 * 8 - kept)
    assert found['dots', True] == 30 * 4 * (kept // 2 + 2 * given - kept)
    assert found['dots', False] == 0  # torch recomputes all or nothing


def test_sizes_over_memory_are_refused_before_anything_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, 'available_bytes', lambda: 4 * 2**30)
    monkeypatch.setattr(environment, 'make', lambda *_: pytest.fail('expected no environment to be made'))
    with pytest.raises(
        limits.TooLarge, match=r'update_full of 64 rows of 4096 tokens in float32: an estimated \d+\.\d'
    ) as e:
        tool.main([f'--output={tmp_path / "out"}', '--cases', 'update_full', '--batch=64', '--context=4096'])
    assert 'expected at most 3.6 GiB (90% of the 4.0 GiB there are)' in str(e.value)
    assert '--peers=none' in str(e.value)


CGROUPS = {
    'version 2': ('0::/\n', {'memory.max': '3000\n'}, 3000),
    'version 2, of a slice': ('0::/a/b\n', {'a/memory.max': '3000\n', 'a/b/memory.max': 'max\n'}, 3000),
    'version 1': ('4:memory:/docker/abc\n', {'memory/memory.limit_in_bytes': '3000\n'}, 3000),
    'version 1, unlimited': ('4:memory:/\n', {'memory/memory.limit_in_bytes': f'{2**63 - 4096}\n'}, 8192),
    'more than there is': ('0::/\n', {'memory.max': '9000\n'}, 8192),
}


@pytest.mark.parametrize('case', CGROUPS)
def test_the_memory_of_a_control_group_is_the_limit(tmp_path, monkeypatch, capsys, case):
    own, files, expected = CGROUPS[case]
    for name, text in {'own': own, 'meminfo': 'MemTotal: 9 kB\nMemAvailable: 8 kB\n', **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(workers, 'CGROUPS', tmp_path)
    monkeypatch.setattr(workers, 'OWN_CGROUPS', tmp_path / 'own')
    monkeypatch.setattr(memory, 'MEMINFO', tmp_path / 'meminfo')
    assert memory.available_bytes() == expected
    (tmp_path / 'own').unlink()
    (tmp_path / 'meminfo').unlink()
    assert memory.available_bytes() is None
    limits.check_memory('a case', 2**30, None, 1, 'advice')
    assert capsys.readouterr().out == 'a case: an estimated 1.0 GiB; the memory there is: unknown\n'


# Our side.


def run_in_process(case: str, job: Job, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The replies of our side to some requests, the first one that everything is loaded."""
    queue, replies = [*requests], []
    bench = Bench(lambda: queue.pop(0) if queue else None, replies.append)
    with pytest.raises(Finished):
        ours.CASES[case](job, bench)
    return replies


QUICK = 'sampling'  # the others run with the whole benchmark (`python -m tools.soak commands`)


@pytest.mark.parametrize('case', [pytest.param(x, marks=() if x == QUICK else pytest.mark.long) for x in CASES])
def test_our_side_of_every_case(case, tmp_path, model):
    folder, config, chat = model
    job = job_of(case, tmp_path, folder, chat)
    job.scratch.mkdir()
    counts = inputs.write(job, chat, config.vocab_size)
    rows = tmp_path / 'rows.npz'
    np.savez(rows, tokens=np.arange(20, dtype=np.int32).reshape(2, 10))
    requests: list[dict[str, Any]] = [{'op': 'score', 'rows': str(rows), 'output': str(tmp_path / 'scores.npy')}]
    requests += [{'op': 'run', 'new_tokens': job.new_tokens}] * 2 + [{'op': 'rest'}]
    if case == 'sampling':
        requests += [{'op': 'save', 'output': str(tmp_path / 'sampled.npz')}]
    loaded, _, *runs = run_in_process(case, job, requests)
    assert loaded['loaded_bytes'] > 0
    scores = np.load(tmp_path / 'scores.npy')
    assert scores.shape == (2, 10)
    assert np.all(scores[:, 0] == 0)
    assert np.all(scores[:, 1:] < 0)
    for reply in runs[:2]:
        assert reply['seconds'] > 0
        assert reply['peak_bytes'] > loaded['loaded_bytes'] / 2
    assert runs[2]['rest_bytes'] > 0
    if case in inputs.CONVERSATIONS:
        assert (
            runs[0]['sampled'] == plan.processed_tokens(job, counts) == job.batch * job.new_tokens * (2 * job.turns - 1)
        )
    else:
        assert runs[0]['grad_norm'] != runs[1]['grad_norm'] > 0  # there was an update
        assert counts.tokens == plan.processed_tokens(job, counts) > counts.trained > 0
    if case == 'sampling':
        with np.load(tmp_path / 'sampled.npz') as saved:
            assert saved['sampled'].sum() == job.new_tokens  # of the first row
            assert np.all(saved['log_prob'][saved['sampled']] < 0)
    assert limits.limit_of(plan.phases(job, counts, limits.weights_of(config)), Rates(1e11, 1e10)).seconds > 0


def test_a_conversation_that_has_no_room_is_refused(model):
    chat = model[2]
    with pytest.raises(ValueError, match=r'--context: expected at least \d+ tokens for 5 turns, found 64'):
        inputs.message_tokens(chat, 64, 5)


@pytest.mark.long  # each case has a test of its own
def test_the_whole_command_without_peers(tmp_path, capsys):
    output = tmp_path / 'out'
    sizes = ['--batch=2', '--context=48', '--new-tokens=8', '--repeats=2', '--devices=2']
    tool.main([f'--output={output}', '--model=random:tiny', '--peers=none', '--cases', 'sampling', 'sft', *sizes])
    printed = capsys.readouterr().out
    found = json.loads((output / 'benchmark.json').read_text())
    assert found['rows'][0]['case'] == 'sampling'
    assert found['rows'][-1]['case'] == 'sft'
    assert {row['case'] for row in found['rows'][1:-1]} <= {tool.AFTER_FIRST}  # none where noise hides it
    assert found['machine']["simrl's devices"] == 2
    for row in found['rows']:
        assert row['peer'] is row['ratio'] is None
        assert 0 < row['share_of_limit']['ours'] < 1
        assert len(row['ours']['seconds']) == 2
    assert '\n| sampling |' in (output / 'benchmark.md').read_text()
    assert '| sampling | tiny float32 | 2 | 48 |' in printed
    with pytest.raises(SystemExit, match='to be a new or empty folder, found files in it'):
        tool.main([f'--output={output}', '--model=random:tiny'])


# Both sides agree, or there is no result.


def replies(**facts: float) -> list[dict[str, Any]]:
    return [facts, facts]


def test_sides_must_agree_on_losses_and_gradients(tmp_path, model):
    job = job_of('sft', tmp_path, *model[::2])
    own = replies(loss=2.0, grad_norm=0.5)
    measure.check_facts(job, {OURS: own, 'torch': replies(loss=2.001, grad_norm=0.5004)})
    with pytest.raises(Disagreement, match=r'sft: grad_norm of update 0 is 0\.51 by torch and 0\.5 by simrl'):
        measure.check_facts(job, {OURS: own, 'torch': replies(loss=2.0, grad_norm=0.51)})


def test_sides_must_sample_as_many_tokens(tmp_path, model):
    job = job_of('sampling', tmp_path, *model[::2])
    measure.check_facts(job, {OURS: replies(sampled=64), 'peer': replies(sampled=64)})
    with pytest.raises(Disagreement, match='expected every run to sample 64 tokens, found that peer sampled 63'):
        measure.check_facts(job, {OURS: replies(sampled=64), 'peer': replies(sampled=63)})


def test_sides_must_agree_on_log_probabilities(tmp_path, model):
    job = job_of('sampling', tmp_path, *model[::2])
    measure.compare(job, 'scores', np.array([-1.0]), np.array([-1.001]))
    for found in (np.array([-1.1]), np.array([np.nan]), np.array([-1.0, -1.0])):
        with pytest.raises(Disagreement, match='sampling: scores differ from those of simrl by up to'):
            measure.compare(job, 'scores', found, np.array([-1.0]))


def test_a_side_that_fails_is_an_error_with_its_log(tmp_path, model):
    job = dataclasses.replace(job_of('sampling', tmp_path, *model[::2]), model=tmp_path / 'nothing')
    with measure.start('simrl', pathlib.Path(sys.executable), 'ours', job) as side:
        with pytest.raises(SideError, match=r'simrl: FileNotFoundError: .*nothing.*; the end of .*simrl\.log:') as e:
            side.load()
        assert 'load_model' in str(e.value)  # of the traceback


# The peers' environment.


@pytest.mark.long
def test_an_environment_that_cannot_be_made_is_an_error(tmp_path):
    requirements = tmp_path / 'requirements.txt'
    requirements.write_text(f'{tmp_path}/missing-1.0-py3-none-any.whl\n')
    with pytest.raises(
        environment.PeerError, match=r"the peers' environment .* cannot be made: .*pip install.* failed:"
    ) as e:
        environment.make(tmp_path / 'env', requirements)
    assert 'missing-1.0-py3-none-any.whl' in str(e.value)
    assert '--peers=none measures simrl alone' in str(e.value)
    assert not (tmp_path / 'env' / environment.MADE_OF).exists()


def test_other_files_are_not_overwritten_by_an_environment(tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(environment.PeerError, match=r'expected .* to be a virtual environment or nothing'):
        environment.make(tmp_path)
    assert (tmp_path / 'mine.txt').exists()


@pytest.mark.parametrize('path', sorted(FOLDER.rglob('*.py')), ids=lambda path: str(path.relative_to(FOLDER)))
def test_each_side_imports_its_own_packages_alone(path):
    """What both sides import, and the peers, need no simrl; nothing but the peers needs torch."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ''} if isinstance(node, ast.ImportFrom) else set()
    packages = {name.split('.')[0] for name in names}
    peer = path.parent.name == 'peers'
    assert peer or not packages & {'torch', 'trl'}
    if peer or path.name in ('job.py', 'protocol.py'):
        assert not packages & {'simrl', 'jax'}


# The report.


def side(name: str, seconds: list[float], memory: int) -> SideResult:
    return SideResult(
        name=name,
        seconds=seconds,
        first_seconds=[],
        warm_up_seconds=7.0,
        loaded_bytes=2**30,
        rest_bytes=2**30,
        peak_bytes=2**30 + memory,
        peak_is='since reset',
        device_peak_bytes=None,
    )


def row(batch: int = 4) -> report.Row:
    return report.Row(
        case='sft',
        model='tiny',
        dtype='float32',
        batch=batch,
        context=256,
        turns=1,
        new_tokens=128,
        tokens=1000,
        limit=Limit(seconds=0.5, memory_share=0.1),
        ours=side('simrl', [2.0, 1.0, 4.0], 64 * 2**20),
        peer=side('torch', [3.0, 4.0, 4.0], 128 * 2**20),
    )


def test_a_row_has_medians_and_the_spread_of_pairs():
    assert row().ratio == (2.0, 1.0, 4.0)
    assert row().memory_ratio == 0.5
    assert row().share(row().ours) == 0.25


def test_what_follows_the_first_token():
    result = dataclasses.replace(row().ours, first_seconds=[0.5, 9.0, 0.5])
    decoding = result.decoding()
    assert decoding is not None
    assert decoding.seconds == [1.5, 0.5, 3.5]
    assert dataclasses.replace(result, first_seconds=[1.0, 1.0, 1.0]).decoding() is None


def test_a_speed_over_the_limit_is_told():
    told = 'faster than the limit: the rates were measured while the machine was busy'
    assert told not in report.summary(row())
    assert told in report.summary(dataclasses.replace(row(), limit=Limit(seconds=3.0, memory_share=0.1)))


def test_the_table():
    header, line, first, *_ = report.table([row()]).splitlines()
    assert header.count('|') == line.count('|') == first.count('|')
    assert first == (
        '| sft | tiny float32 | 4 | 256 | 1 | torch | 500 | 250 | 2.00 [1.00, 4.00] | 64 | 128 | 0.50 | '
        'matrix products | 25% | 12% | 7.0 | 7.0 |'
    )
    alone = report.table([dataclasses.replace(row(), peer=None)]).splitlines()[2]
    assert '| – | 500 | – | – | 64 | – | – |' in alone


def test_the_files(tmp_path):
    report.write(tmp_path, {'device': 'cpu'}, [row(2), row(4)])
    assert {path.name for path in tmp_path.iterdir()} == {
        'benchmark.json',
        'benchmark.md',
        'ratios.png',
        'sweep-sft-vs-torch-tiny-batch.png',
    }
    first = json.loads((tmp_path / 'benchmark.json').read_text())['rows'][0]
    assert first['ratio'] == {'of_medians': 2.0, 'least': 1.0, 'largest': 4.0}
    assert first['ours']['seconds'] == [2.0, 1.0, 4.0]


def test_unknown_names_are_errors(tmp_path, capsys):
    for argument, message in (
        (
            '--cases=tea',
            f"--cases: expected some of {', '.join(CASES)}, found 'tea'",
        ),
        ('--model=random:huge', "found 'random:huge'"),
        ('--repeats=0', '--repeats: expected at least 1, found 0'),
        ('--threads=4096', 'found 4096'),
        ('--threads=1 --devices=2', '--devices: expected at most one a thread, and 1 with --gpu, found 2'),
        ('--devices=2 --batch=3', '--devices: expected a number that divides the 3 rows of sampling, found 2'),
    ):
        with pytest.raises(SystemExit):
            tool.parse([f'--output={tmp_path}', *argument.split()])
        assert message in capsys.readouterr().err
