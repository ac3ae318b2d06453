"""Agents by name: a stage is loaded with the model and tokenizer that it was made with, or refused."""

import types

import pytest

from simrl.run.stage_files import WorkdirError
from simrl.run.stages import Stage, run_stages
from simrl.serving.load import check_model


def scene_at(workdir, model, *, rewrites='error', simulator=None):
    """The parts of a scene that say which models it has; models are files."""
    own = {} if simulator is None else {'simulator_model': simulator}
    return types.SimpleNamespace(
        workdir=workdir,
        identity=lambda: {'model': {'rewrites': rewrites}, 'dtypes': 'float32'},
        inputs=lambda: {'model': model, 'conversations': workdir.parent / 'conversations'},
        simulator_identity=lambda arm: {name: {'date': None} for name in own},
        simulator_inputs=lambda arm, seed: own,
    )


@pytest.fixture
def made(tmp_path):
    """The files of two models and of data, and the folder of a stage that was made with them."""
    first, second, data = (tmp_path / name for name in ('first', 'second', 'conversations'))
    for file in (first, second, data):
        file.write_text(file.name)
    scene = scene_at(tmp_path / 'run', first, simulator=second)
    settings = {**scene.identity(), **scene.simulator_identity('arm'), 'user_sft': 3}
    stage = Stage('sft/arm', settings, {**scene.inputs(), **scene.simulator_inputs('arm', 0)}, lambda folder: None)
    run_stages(scene.workdir, [stage], on_event=lambda event: None)
    return first, second, data, scene.workdir / 'sft/arm'


def test_a_stage_of_the_same_models_is_taken(made, tmp_path):
    first, second, data, folder = made
    data.unlink()  # a run is loaded where its data are not
    check_model(scene_at(tmp_path / 'run', first), folder)
    check_model(scene_at(tmp_path / 'run', first, simulator=second), folder, ('arm', 0))
    moved = first.rename(tmp_path / 'moved')
    check_model(scene_at(tmp_path / 'run', moved), folder)


def test_a_stage_of_another_model_is_refused(made, tmp_path):
    first, second, _, folder = made
    refused = pytest.raises(WorkdirError, match=r'sft/arm: made with another model or tokenizer .*: (input )?(\w+)')
    for scene, simulator, name in (
        (scene_at(tmp_path / 'run', second, simulator=second), None, 'input model'),
        (scene_at(tmp_path / 'run', first, rewrites='keep'), None, 'model.rewrites'),
        (scene_at(tmp_path / 'run', first, simulator=first), ('arm', 0), 'input simulator_model'),
        (scene_at(tmp_path / 'run', first), ('arm', 0), 'simulator_model'),
    ):
        with refused as caught:
            check_model(scene, folder, simulator)
        assert f'here now: {name}' in str(caught.value)


def test_a_model_whose_files_were_replaced_is_another(made, tmp_path):
    first, _, _, folder = made
    first.write_text('another tokenizer')
    with pytest.raises(WorkdirError, match='here now: input model: '):
        check_model(scene_at(tmp_path / 'run', first), folder)
