"""Prepared data and its manifest: where it comes from, by which settings, and hashes of what was written.

    manifest.json  tool, settings, inputs and outputs with size and sha256, counts; written last
    unfinished/    what a killed preparation resumes from; deleted once the manifest is written

A folder has one preparation. The same command resumes it or confirms it; other settings or inputs are refused.
"""

import functools
import hashlib
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simrl.run import config
from simrl.run.stage_files import LOCK_FILE, is_foreign, read_json, shorten, wait_for_lock, write_json

MANIFEST_FILE, UNFINISHED_FOLDER, IDENTITY_FILE = 'manifest.json', 'unfinished', 'identity.json'
IDENTITY = ('tool', 'settings', 'inputs')


def describe(path: pathlib.Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open('rb') as file:
        return {'size': path.stat().st_size, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}


def check_data(path: pathlib.Path) -> None:
    """Refuses a data file other than the one that the manifest beside it describes. Without a manifest all is well.

    Raises:
        ValueError: another size or hash, or a manifest that describes no files.
        WorkdirError: the manifest is damaged.
    """
    manifest = read_json(path.with_name(MANIFEST_FILE))
    if manifest is None or not path.exists():
        return
    outputs = manifest.get('outputs')
    if not isinstance(outputs, Mapping):
        raise ValueError(f'{path.with_name(MANIFEST_FILE)}: expected the outputs of a preparation, found none')
    if path.name in outputs:
        _compare(path, outputs[path.name])


def _compare(path: pathlib.Path, described: Any) -> None:
    expected = f'{path}: expected the file that {MANIFEST_FILE} beside it describes'
    if not isinstance(described, Mapping) or not described.keys() >= {'size', 'sha256'}:
        raise ValueError(f'{expected}, found no size and sha256 in the manifest')
    stat = path.stat()
    if stat.st_size != described['size']:
        raise ValueError(f'{expected}, of {described["size"]} bytes, found {stat.st_size} bytes')
    found = _known_hash(path, stat.st_size, stat.st_mtime_ns)
    if found != described['sha256']:
        raise ValueError(f'{expected}, with sha256 {described["sha256"]}, found {found}')


@functools.lru_cache(maxsize=64)
def _known_hash(path: pathlib.Path, size: int, mtime_ns: int) -> str:
    """Hashes a file once per process, as long as it keeps its size and mtime."""
    return str(describe(path)['sha256'])


def prepare(
    folder: pathlib.Path,
    tool: str,
    settings: Any,
    inputs: Mapping[str, Any],
    make: Callable[[pathlib.Path], Mapping[str, Any]],
    outputs: Sequence[str],
) -> dict[str, Any]:
    """Makes data in a folder unless it is there, and writes the manifest.

    Args:
        folder: empty, new, or of the same preparation, whole or unfinished.
        tool: name of the preparation.
        settings: a dataclass.
        inputs: content hashes of what is read.
        make: writes the outputs into `folder`; gets a folder that a killed run of the same identity may have left files
            in. Returns counts for the manifest.
        outputs: names of the files that `make` writes.

    Returns:
        The manifest.

    Raises:
        ValueError: the folder has other files, or a preparation with other settings, inputs or changed outputs.
    """
    identity = {'tool': tool, 'settings': config.identity(settings), 'inputs': dict(inputs)}
    unfinished = folder / UNFINISHED_FOLDER
    with wait_for_lock(folder):
        manifest = read_json(folder / MANIFEST_FILE)
        if manifest is None:
            _begin(folder, identity)
            counts = make(unfinished)
            manifest = {**identity, **counts, 'outputs': {name: describe(folder / name) for name in outputs}}
            write_json(folder / MANIFEST_FILE, manifest)
        else:
            _confirm(folder, manifest, identity)
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def _begin(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Makes the folder of what is unfinished; files of another identity in it are deleted."""
    unfinished = folder / UNFINISHED_FOLDER
    others = [path.name for path in folder.iterdir() if path.name != LOCK_FILE and not is_foreign(path)]
    if others and not unfinished.exists():
        raise ValueError(f'{folder}: expected an empty folder or an unfinished preparation, found {shorten(others)}')
    if unfinished.exists() and read_json(unfinished / IDENTITY_FILE) != identity:
        shutil.rmtree(unfinished)
    unfinished.mkdir(exist_ok=True)
    write_json(unfinished / IDENTITY_FILE, identity)


def _confirm(folder: pathlib.Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if changed := config.differences({key: manifest.get(key) for key in IDENTITY}, identity):
        raise ValueError(
            f'{folder}: expected a new folder or one prepared from the same, found it prepared with other settings or '
            f'inputs: {shorten(changed)}'
        )
    for name, described in manifest.get('outputs', {}).items():
        if not (folder / name).exists():
            raise ValueError(f'{folder / name}: expected the file that {MANIFEST_FILE} describes, found none')
        _compare(folder / name, described)
