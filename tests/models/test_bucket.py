"""Checkpoints in a bucket: kept, restored and removed as on a disk, by an emulator of Google's storage."""

import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from simrl.run import stage_files
from simrl.run.stage_files import PLACE_FILE

BUCKET = 'simrl-test'
TREE = """
import pathlib, sys
import jax
import jax.numpy as jnp
from simrl.models.checkpoint import Checkpoints
folder, elsewhere = pathlib.Path(sys.argv[1]), sys.argv[2]
def state(step):
    return {'weights': jnp.arange(2e6).reshape(2, -1) + step, 'count': jnp.int32(step)}
"""
SAVE = """
with Checkpoints(folder, keep=2, elsewhere=elsewhere) as checkpoints:
    for step in range(1, 1000):
        checkpoints.save(step, state(step), {'step': step})
        print(step, flush=True)
"""
RESTORE = """
with Checkpoints(folder, keep=2, elsewhere=elsewhere) as checkpoints:
    step, found, meta = checkpoints.restore(state(0))
    assert checkpoints.steps == [step - 1, step], checkpoints.steps
    assert meta == {'step': step}, meta
    assert all(bool((found[name] == array).all()) for name, array in state(step).items())
    checkpoints.save(step + 1, state(step + 1), {'step': step + 1})
    print(*checkpoints.steps)
"""


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope='module')
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables with which a process finds the emulator, which keeps what it is given in memory."""
    command = shutil.which('gcp-storage-emulator')
    if command is None:
        pytest.skip('needs gcp-storage-emulator and gcsfs (pip install gcp-storage-emulator gcsfs)')
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    arguments = [f'--port={port}', '--host=127.0.0.1', f'--default-bucket={BUCKET}', '--in-memory']
    url = f'http://127.0.0.1:{port}'
    log_file = tmp_path_factory.mktemp('bucket') / 'emulator.log'
    with log_file.open('w') as log:
        process = subprocess.Popen([command, 'start', *arguments], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not answers(f'{url}/storage/v1/b/{BUCKET}'):
                assert process.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline, log_file.read_text()
                time.sleep(0.2)
            yield {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url, 'GOOGLE_CLOUD_PROJECT': 'none'}
        finally:
            process.kill()
            process.wait()


@pytest.mark.long
def test_a_kill_in_a_save_leaves_what_was_there(
    bucket: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    folder, elsewhere = tmp_path / 'stage' / 'checkpoints', f'gs://{BUCKET}/runs'
    saved = 0
    for round_ in range(2):
        run = subprocess.Popen(
            [sys.executable, '-c', TREE + SAVE.replace('range(1,', f'range({saved + 1},'), str(folder), elsewhere],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        for _ in range(3):
            saved = int(run.stdout.readline())
        time.sleep(0.15 * round_)  # somewhere in the next save
        run.kill()
        rest = run.stdout.read().split()
        run.wait()
        saved = int(rest[-1]) if rest else saved
        found = subprocess.run(
            [sys.executable, '-c', TREE + RESTORE, str(folder), elsewhere], capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        steps = [int(step) for step in found.stdout.split()]
        assert steps[0] in (saved, saved + 1), (steps, saved)  # it may have been whole when the process was killed
        saved = steps[-1]
    assert [path.name for path in folder.iterdir()] == [PLACE_FILE]
    place = stage_files.read_json(folder / PLACE_FILE)
    assert place is not None
    gcsfs = pytest.importorskip('gcsfs')
    files = gcsfs.GCSFileSystem(token='anon', endpoint_url=bucket['STORAGE_EMULATOR_HOST'], use_listings_cache=False)
    under = place['folder'].removeprefix('gs://')
    assert sorted({name.removeprefix(f'{under}/').split('/')[0] for name in files.find(under)}) == sorted(
        map(str, (saved - 1, saved))
    )
    stage_files.remove_scratch(folder.parent)
    assert not files.find(under)
    assert not folder.exists()
