"""WildChat at its size: memory is bounded, and `kill -9` loses nothing."""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from simrl.conversations import wildchat
from simrl.conversations.wildchat import DECISIONS, NGRAMS
from simrl.conversations.wildchat_facts import READING
from tests.conversations.wildchat_rows import WHEN, wildbench_row, write_jsonl

ROOT = pathlib.Path(__file__).parent.parent.parent
PER_FILE = 20_000
FRENCH, COPY, FREQUENT = 4, 100, 100  # one row of so many


def write_many(folder: pathlib.Path, rows: int) -> pathlib.Path:
    """Writes rows of 4 messages in files; but for those with a common beginning first messages are different."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def draw(number: int) -> list[str]:
        lengths = np.minimum(rng.lognormal(3.8, 1.1, number).astype(int) + 8, 900)
        words = [f'w{word}' for word in rng.integers(0, 30_000, lengths.sum())]
        ends = np.cumsum(lengths)
        return [' '.join(words[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    later = pyarrow.array(draw(2000))  # messages after the first, drawn again and again
    for begin in range(0, rows, PER_FILE):
        number = np.arange(begin, begin + PER_FILE)
        openings = [
            f'the same seven words as many others {text}' if i % FREQUENT == 2 else text
            for i, text in zip(number, draw(PER_FILE), strict=True)
        ]
        others = later.take(rng.integers(0, len(later), 3 * PER_FILE))
        messages = pyarrow.concat_arrays([pyarrow.array(openings), others])
        order = np.arange(4 * PER_FILE).reshape(4, PER_FILE).T.reshape(-1)
        roles = pyarrow.array(['user', 'assistant', 'user', 'assistant'] * PER_FILE)
        spoken = pyarrow.StructArray.from_arrays([roles, messages.take(order)], ['role', 'content'])
        columns = {
            'conversation_hash': [f'{i - (i % COPY == 1):032x}' for i in number],
            'model': ['gpt-4'] * PER_FILE,
            'timestamp': [WHEN + datetime.timedelta(seconds=int(i)) for i in number],
            'conversation': pyarrow.ListArray.from_arrays(np.arange(0, 4 * PER_FILE + 1, 4, np.int32), spoken),
            'turn': [2] * PER_FILE,
            'language': ['French' if i % FRENCH == 3 else 'English' for i in number],
            'toxic': [False] * PER_FILE,
            'redacted': [False] * PER_FILE,
            'country': [f'country {x}' for x in rng.geometric(0.1, PER_FILE)],
            'hashed_ip': [f'{x:064x}' for x in rng.integers(0, rows // 5, PER_FILE)],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f'{begin:08d}.parquet', row_group_size=1000)
    return folder


@pytest.mark.long
def test_a_million_rows_take_under_two_gigabytes_and_survive_a_kill(tmp_path):
    rows = int(os.environ.get('SIMRL_WILDCHAT_ROWS', 1_000_000))
    source, out = write_many(tmp_path / 'data', rows), tmp_path / 'out'
    tasks = write_jsonl(tmp_path / 'tasks.jsonl', [wildbench_row('never asked')])
    options = [f'--source={source}', f'--wildbench={tasks}', f'--output={out}']
    command = [sys.executable, '-m', 'tools.prepare', 'wildchat', *options]
    for passed in (f'{NGRAMS}/{READING}', DECISIONS):  # one kill in each pass
        with subprocess.Popen(command, cwd=ROOT) as process:
            while process.poll() is None and not (out / 'unfinished' / passed).exists():
                time.sleep(0.1)
            time.sleep(2)
            process.kill()
    assert {path.name for path in out.iterdir()} == {'unfinished', 'stage.lock', f'{wildchat.OUTPUT}.partial'}
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)  # its own use: other tests have children too
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    made = json.loads((out / 'manifest.json').read_text())
    assert made['dropped'] == {
        'language is not English': rows // FRENCH,
        'duplicate conversation': rows // COPY,
        'frequent first message': rows // FREQUENT,
    }
    assert made['kept'] == rows - sum(made['dropped'].values())
    shares = np.array([made['addresses'][name] for name in ('train', 'dev', 'test')]) / sum(made['addresses'].values())
    np.testing.assert_allclose(shares, (0.89, 0.05, 0.06), atol=0.005)
    peak = used.ru_maxrss / 2**20
    print(f'peak {peak:.2f} GB')
    assert peak < 2
