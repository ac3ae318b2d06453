"""Identities of assistants: of contents alone, wherever these are."""

import datetime
import pathlib
import types

import pytest
import transformers

from simrl.run.stages import Stage, run_stages
from simrl.serving import identity, load
from simrl.serving.identity import identity_of
from tests.tiny import CHATML, byte_tokenizer


def model_folder(folder: pathlib.Path, template: str = CHATML) -> pathlib.Path:
    """A model as a Hugging Face folder; nobody reads its weights."""
    tokenizer = byte_tokenizer(template=template)
    tokenizer.save_pretrained(folder)
    heads = {'num_attention_heads': 2, 'num_key_value_heads': 1, 'num_hidden_layers': 1}
    sizes = {'vocab_size': len(tokenizer), 'hidden_size': 16, 'intermediate_size': 16}
    transformers.LlamaConfig(**heads, **sizes).save_pretrained(folder)
    (folder / 'model.safetensors').write_text('weights')
    return folder


def test_a_moved_model_is_the_same_and_another_in_its_place_is_not(tmp_path) -> None:
    folder = model_folder(tmp_path / 'model')
    first = identity_of(str(folder))
    moved = folder.rename(tmp_path / 'moved')
    (moved / '.DS_Store').write_text('of a file manager')
    assert identity_of(str(moved)) == first
    found = {first}
    for name in ('model.safetensors', 'tokenizer.json'):
        content = (moved / name).read_text()
        (moved / name).write_text(f'{content} ')
        found.add(identity_of(str(moved)))
        (moved / name).write_text(content)
    assert len(found) == 3


def test_a_template_that_writes_the_date_is_another_each_day(tmp_path, monkeypatch) -> None:
    dated = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
    found = []
    for name, template in (('plain', CHATML), ('dated', dated)):
        folder = model_folder(tmp_path / name, template)
        for day in (1, 2):
            today = types.SimpleNamespace(today=lambda day=day: datetime.date(2026, 7, day))
            monkeypatch.setattr(load, 'datetime', types.SimpleNamespace(date=today))
            found.append(identity_of(str(folder)))
    assert found[0] == found[1]
    assert found[2] != found[3]


@pytest.mark.parametrize('stage', ['sft/assistant', None])
def test_an_assistant_of_a_run_is_its_stage_or_the_model_that_the_run_starts_from(tmp_path, monkeypatch, stage) -> None:
    def model_of(workdir):
        return workdir.with_suffix('.model')

    def scene_at(workdir):
        """The parts of a scene that say which model it has."""
        return types.SimpleNamespace(
            workdir=workdir,
            identity=lambda: {'model': {'rewrites': 'error'}},
            inputs=lambda: {'model': model_of(workdir), 'conversations': workdir / 'conversations'},
        )

    def identity_at(workdir):
        monkeypatch.setattr(identity, 'find_run', lambda path: (scene_at(workdir), 'part'))
        folder = None if stage is None else workdir / stage
        monkeypatch.setattr(identity, 'assistant_stage', lambda name, scene, part: folder)
        return identity_of('RUN/part')

    def made(workdir, text):
        model_of(workdir).write_text(text)
        files = {'model': model_of(workdir)}
        work = Stage('sft/assistant', {}, files, lambda folder: (folder / 'weights').write_text(text) and None)
        run_stages(workdir, [work], on_event=lambda event: None)
        return workdir

    first = identity_at(made(tmp_path / 'run', 'a'))
    model_of(tmp_path / 'run').rename(model_of(tmp_path / 'moved'))
    (tmp_path / 'run' / 'conversations').write_text('of others')
    assert identity_at((tmp_path / 'run').rename(tmp_path / 'moved')) == first
    assert identity_at(made(tmp_path / 'run', 'b')) != first
