"""Metrics as (sum, weight); files that TensorBoard reads and a resumed run truncates."""

import io
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import (
    event_accumulator,
    plugin_event_accumulator,
    plugin_event_multiplexer,
)
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, metadata
from tensorboard.util import tensor_util

from simrl.run import metrics
from simrl.run.metrics import EVENTS_NAME, Writer
from simrl.run.stage_files import WorkdirError
from tests import kills


def test_ragged_parts_agree_with_the_whole() -> None:
    values = np.arange(10.0)

    @jax.jit
    def part(x: jax.Array) -> dict:
        return {'loss': (x.sum(), jnp.float32(x.size))}

    parts = metrics.add(metrics.add(part(values[:7]), part(values[7:9])), part(values[9:]))
    assert metrics.mean(parts) == {'loss': values.mean()}
    assert metrics.mean(part(values)) == {'loss': values.mean()}
    # A name that only some have keeps its own weight; nothing measured is not a number, and no 0.
    mixed = metrics.mean(metrics.add({'a': (1.0, 2.0)}, {'b': (3.0, 1.0), 'c': (0.0, 0.0)}))
    assert (mixed['a'], mixed['b']) == (0.5, 3.0)
    assert math.isnan(mixed['c'])
    with pytest.raises(ValueError, match=r"metric 'loss': expected a scalar sum, found shape \(3,\)"):
        metrics.mean({'loss': (jnp.zeros(3), 1.0)})


def write_some(writer: Writer, start: int, stop: int) -> None:
    for step in range(start, stop):
        writer.log(step, {'loss': 1.0 / step, 'time/seconds': 5.0})
        writer.conversations('rl', [{'step': step, 'text': 'x' * step}])
        writer.text(step, 'sample', f'# step {step}')


def test_lines_and_events_are_what_was_logged(tmp_path: pathlib.Path) -> None:
    png = io.BytesIO()
    Image.new('RGB', (4, 2), 'red').save(png, 'png')
    with Writer(tmp_path) as writer:
        writer.hyperparameters({'optimizer': {'learning_rate': 0.5, 'schedule': 'cosine'}, 'sizes': [1, 2], 'on': True})
        writer.log(1, {'loss': 0.25, 'accuracy': math.nan})
        writer.text(1, 'sample', '**user** hello')
        writer.image(1, 'plot', png.getvalue(), 4, 2)
        writer.conversations('rl', [{'text': '\ud800 é', 'reward': np.float32(0.5), 'masked': float('nan')}])
        writer.finished(1)

    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "loss": 0.25, "accuracy": null}\n'
    row = json.loads((tmp_path / 'conversations' / 'rl.jsonl').read_text())
    assert row == {'text': '\ud800 é', 'reward': 0.5, 'masked': None}

    events = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    loss = events.Tensors('loss')[0]
    assert (loss.step, tensor_util.make_ndarray(loss.tensor_proto)) == (1, 0.25)
    assert np.isnan(tensor_util.make_ndarray(events.Tensors('accuracy')[0].tensor_proto))
    assert tensor_util.make_ndarray(events.Tensors('sample')[0].tensor_proto).item() == b'**user** hello'
    width, height, data = tensor_util.make_ndarray(events.Tensors('plot')[0].tensor_proto)
    assert (width, height) == (b'4', b'2')
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 0, 0)
    assert events.summary_metadata['plot'].plugin_data.plugin_name == 'images'
    assert events.summary_metadata['sample'].plugin_data.plugin_name == 'text'
    assert events.summary_metadata['loss'].plugin_data.plugin_name == 'scalars'


def test_the_hyperparameters_tab_finds_the_run(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path) as writer:
        writer.hyperparameters({'optimizer': {'learning_rate': 0.5, 'schedule': 'cosine'}})
        writer.log(1, {'loss': 0.25})
        writer.finished(1)
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRun(str(tmp_path / 'tensorboard'), 'run')
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = RequestContext()
    found = context.hparams_metadata(request, 'any')
    experiment = context.experiment_from_metadata(request, 'any', True, found, {})
    names = {info.name for info in experiment.hparam_infos}
    assert names == {'optimizer.learning_rate', 'optimizer.schedule'}
    assert set(found['run']) == {metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
    start = metadata.parse_session_start_info_plugin_data(found['run'][metadata.SESSION_START_INFO_TAG])
    assert start.hparams['optimizer.learning_rate'].number_value == 0.5
    assert start.hparams['optimizer.schedule'].string_value == 'cosine'
    end = metadata.parse_session_end_info_plugin_data(found['run'][metadata.SESSION_END_INFO_TAG])
    assert end.status == api_pb2.STATUS_SUCCESS


def test_truncated_files_continue_as_if_unbroken(tmp_path: pathlib.Path) -> None:
    unbroken, broken = tmp_path / 'unbroken', tmp_path / 'broken'
    with Writer(unbroken) as writer:
        write_some(writer, 1, 9)
    with Writer(broken) as writer:
        write_some(writer, 1, 4)
        offsets = writer.offsets()
        write_some(writer, 4, 7)
        writer.conversations('late', [{'step': 6}])  # a file without an offset
    with open(broken / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 7, "los')  # a kill in the middle of a line
    with open(broken / 'tensorboard' / f'{EVENTS_NAME}.0000', 'ab') as file:
        file.write(b'\x10\0\0')

    with Writer(broken) as writer:
        writer.truncate(json.loads(json.dumps(offsets)), 4)
        assert writer.offsets() == offsets
        write_some(writer, 4, 9)
    kills.assert_same_run(unbroken, broken)
    assert (broken / 'metrics.jsonl').read_bytes() == (unbroken / 'metrics.jsonl').read_bytes()

    with Writer(broken) as writer:
        writer.truncate({}, 0)
        assert sum(writer.offsets().values()) == 0


def curve(events: plugin_event_accumulator.EventAccumulator) -> list[tuple[int, float]]:
    """The steps and losses that TensorBoard shows."""
    events.Reload()
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in events.Tensors('loss')]


def test_an_open_tensorboard_shows_what_a_resumed_run_writes(tmp_path: pathlib.Path) -> None:
    """With TensorBoard's own loader: open throughout, and opened at the end."""

    def losses(steps: range, process: int) -> list[tuple[int, float]]:
        return [(step, step + 1000.0 * process) for step in steps]

    def process(number: int, offsets: dict[str, int], first: int, last: int, saves: int) -> dict[str, int]:
        """Logs its steps and is killed within the next record; the files' lengths at step `saves`."""
        with Writer(tmp_path) as writer:
            writer.truncate(offsets, first)
            for step, loss in losses(range(first, last + 1), number):
                writer.log(step, {'loss': loss})
                if step == saves:
                    offsets = writer.offsets()
        with open(sorted((tmp_path / 'tensorboard').iterdir())[-1], 'ab') as file:
            file.write(b'\x10\0\0')
        return offsets

    offsets = process(0, {}, 0, 7, saves=-1)  # killed before its first checkpoint
    live = plugin_event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
    assert curve(live) == losses(range(8), 0)
    offsets = process(1, offsets, 0, 10, saves=5)
    assert curve(live) == losses(range(11), 1)
    process(2, offsets, 6, 8, saves=-1)  # killed before its first checkpoint; TensorBoard sees the next one, too
    true = losses(range(6), 1)
    assert curve(live) == true + losses(range(6, 9), 2)
    with Writer(tmp_path) as writer:
        writer.truncate(offsets, 6)  # killed before its first line
    process(4, offsets, 6, 20, saves=15)
    for events in (live, plugin_event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))):
        assert curve(events) == true + losses(range(6, 21), 4)


def test_lost_logs_are_said_and_lost_lines_of_metrics_refused(tmp_path: pathlib.Path, capsys) -> None:
    with Writer(tmp_path) as writer:
        write_some(writer, 1, 3)
        offsets = writer.offsets()
        write_some(writer, 3, 4)
    (tmp_path / 'conversations' / 'rl.jsonl').write_text('')
    shutil.rmtree(tmp_path / 'tensorboard')
    lines = (tmp_path / 'metrics.jsonl').read_text()
    for changed in ('', lines[:20], lines.replace('1', '10')):  # as an offset within a line shows
        (tmp_path / 'metrics.jsonl').write_text(changed)
        size = offsets['metrics.jsonl']
        message = rf'metrics\.jsonl: expected the {size} bytes of the checkpoint, found {len(changed)} or other lines'
        with Writer(tmp_path) as writer, pytest.raises(WorkdirError, match=rf'{message}.* delete {tmp_path} to start'):
            writer.truncate(offsets, 3)
        assert (tmp_path / 'metrics.jsonl').read_text() == changed
    (tmp_path / 'metrics.jsonl').write_text(lines)
    capsys.readouterr()
    with Writer(tmp_path) as writer:
        writer.truncate(offsets, 3)
        write_some(writer, 3, 4)
    lost = [name for name in offsets if name != 'metrics.jsonl']
    assert len(lost) == 2
    assert capsys.readouterr().out.splitlines() == [
        f'{tmp_path / name}: expected the {offsets[name]} bytes of the checkpoint, found 0; the rest is lost'
        for name in lost
    ]
    assert [path.name for path in (tmp_path / 'tensorboard').iterdir()] == [f'{EVENTS_NAME}.0001']
    assert json.loads((tmp_path / 'conversations' / 'rl.jsonl').read_text())['step'] == 3


def test_offsets_are_what_was_written_though_a_file_is_emptied_meanwhile(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path) as writer:
        writer.log(1, {'loss': 1.0})
        size = (tmp_path / 'metrics.jsonl').stat().st_size
        (tmp_path / 'metrics.jsonl').write_text('')
        writer.log(2, {'loss': 1.0})
        assert writer.offsets()['metrics.jsonl'] == 2 * size


def test_a_full_disk_is_named(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path) as writer:
        writer.log(1, {'loss': 1.0})
        writer._files['metrics.jsonl'].close()
        writer._files['metrics.jsonl'] = open('/dev/full', 'wb')  # noqa: SIM115
        with pytest.raises(OSError, match=r'could not write .*metrics\.jsonl: No space left on device'):
            writer.log(2, {'loss': 1.0})
        with pytest.raises(OSError, match=r'could not write .*metrics\.jsonl: No space left on device'):
            writer.close()  # it tries once more


def test_a_metric_may_not_be_called_step(tmp_path: pathlib.Path) -> None:
    with Writer(tmp_path) as writer, pytest.raises(ValueError, match="other names than 'step'"):
        writer.log(1, {'step': 1.0})
