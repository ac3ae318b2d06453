"""The curves: each of them in a small form, and that they measure what they say."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from simrl.conversations.chat import ASSISTANT
from simrl.run import memory
from tools.benchmark import limits
from tools.curves import __main__ as tool
from tools.curves import report, work
from tools.curves.__main__ import Sizes
from tools.curves.report import Curve, Point
from tools.curves.work import Model

SIZES = Sizes(
    rows=2,
    opening_words=1,
    message_tokens=3,
    capacities=(1, 2),
    turns=2,
    row_length=16,
    shares=(0.25, 1.0),
    lengths=(8, 16),
    vocabularies=(256, 16384),
    memory_lengths=(8,),
)


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return work.load('random:tiny', tmp_path_factory.mktemp('curves') / 'model', 'float32', 'none')


@pytest.mark.long
def test_all_curves_in_a_small_form(tmp_path: pathlib.Path) -> None:
    options = tool.parse([f'--output={tmp_path}', '--repeats=2'])
    tool.draw(tmp_path, options.curves, options, SIZES)
    names = ['capacity', 'turns', 'trained_tokens', 'row_length', 'memory']
    assert {path.name for path in tmp_path.iterdir()} == {'curves.json', 'curves.md', *(f'{n}.png' for n in names)}
    written = json.loads((tmp_path / 'curves.json').read_text())
    assert [curve['name'] for curve in written['curves']] == names
    assert written['environment']['model'] == 'random:tiny'
    curves = {curve['name']: curve['lines'] for curve in written['curves']}
    places = {name: [point['x'] for point in next(iter(lines.values()))] for name, lines in curves.items()}
    needed = places['capacity'][0]
    assert places == {
        'capacity': [needed, 2 * needed],
        'turns': [1, 2],
        'trained_tokens': [8, 30],
        'row_length': [8, 16],
        'memory': [256, 16384],
    }
    for name in names[:-1]:
        for point in curves[name].popitem()[1]:
            assert len(point['values']) == 2
            assert all(value > 0 for value in point['values'])
    planned, whole = ([point['values'] for point in line] for line in curves['memory'].values())
    assert whole == [[2 * 8 * 256 * 4 / 2**20], [2 * 8 * 16384 * 4 / 2**20]]
    assert planned[1] > planned[0]


@pytest.mark.long
def test_conversations_do_not_depend_on_the_room_for_them(model: Model) -> None:
    """What `capacity` compares is the same work: equal tokens in equally full contexts."""
    scene = work.scene_of(model, SIZES.rows, SIZES.opening_words, SIZES.message_tokens)
    needed = work.needed_capacity(scene, turns=1)
    found = []
    for tokens in (needed, 2 * needed):
        dialogue = work.opened(scene, tokens, turns=1)
        assert dialogue.user.capacity == dialogue.assistant.capacity == tokens
        dialogue = work.said(scene, dialogue, ASSISTANT)
        work.check_said(scene, dialogue, 1)
        found.append((np.asarray(dialogue.messages), np.asarray(dialogue.assistant.length)))
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match=r'expected 0 messages of \[\] tokens in every conversation, found'):
        work.check_said(scene, dialogue, 0)


@pytest.mark.parametrize(
    ('curve', 'what', 'advice'),
    [
        ('capacity', r'2 rows of \d+ tokens in float32', 'lower --rows or --message-tokens'),
        ('turns', r'2 rows of \d+ tokens in float32', 'lower --rows, --message-tokens or --turns'),
        ('trained', '2 rows of 16 tokens in float32', 'lower --rows or --row-length'),
    ],
)
def test_sizes_over_memory_are_refused_before_anything_is_allocated(
    model: Model, monkeypatch: pytest.MonkeyPatch, curve: str, what: str, advice: str
) -> None:
    for name in ('opened', 'update_of', 'batch_of'):
        monkeypatch.setattr(work, name, lambda *_, **__: pytest.fail('expected nothing to be made'))
    monkeypatch.setattr(memory, 'available_bytes', lambda: 2**28)
    found = r': an estimated \d+\.\d GiB for one process, expected at most 0\.2 GiB'
    with pytest.raises(limits.TooLarge, match=what + found) as e:
        tool.CURVES[curve](model, SIZES, 1)
    assert advice in str(e.value)


def test_rows_have_as_many_trained_tokens_as_they_say(model: Model) -> None:
    for trained in (1, 5, 7):
        batch = work.batch_of(model, 2, 8, trained)
        np.testing.assert_array_equal(batch.trained.sum(axis=1), [trained, trained])
    with pytest.raises(ValueError, match='expected 1 to 7 trained tokens in a row of 8, found 8'):
        work.batch_of(model, 2, 8, 8)


def test_measures_take_turns_and_the_first_round_is_left_out() -> None:
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = tool.in_turn({name: lambda name=name: measure(name) for name in 'ab'}, repeats=2)
    assert order == list('ababab')
    assert found == {'a': [3, 5], 'b': [4, 6]}


def test_a_table_has_medians_and_what_they_are_of_the_first() -> None:
    points = [Point(1, (2.0, 1.0, 9.0)), Point(2, (4.0, 5.0, 6.0))]
    curve = Curve('name', 'Title', 'room', 'ms', {'ms': points, 'MiB': [Point(1, (8.0,)), Point(2, (4.0,))]})
    assert report.table(curve).splitlines() == [
        '| room | ms | of the first | MiB | of the first |',
        '| ---: | ---: | ---: | ---: | ---: |',
        '| 1 | 2 [1, 9] | 1.00 | 8 | 1.00 |',
        '| 2 | 5 [4, 6] | 2.50 | 4 | 0.50 |',
    ]
    with pytest.raises(ValueError, match='shorter'):
        report.table(dataclasses.replace(curve, lines={'a': points, 'b': points[:1]}))


def test_impossible_sizes_are_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ('repeats', 'rows', 'message-tokens', 'turns'):
        with pytest.raises(SystemExit):
            tool.parse([f'--output={tmp_path}', f'--{flag}=0'])
        assert f'--{flag}: expected at least 1, found 0' in capsys.readouterr().err
