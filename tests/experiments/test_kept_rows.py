"""Rows of a stage are rendered once: what is kept is what was rendered."""

import collections

import numpy as np
import pytest

from simrl.conversations.records import Message
from simrl.conversations.templates import chat_from_huggingface
from simrl.conversations.views import PreferenceRow, render
from simrl.experiments.kept_rows import FIELDS, kept_pairs, kept_rows
from tests.tiny import byte_tokenizer

CHAT = chat_from_huggingface(byte_tokenizer())
COUNTS = collections.Counter({'cut': 3})


def row(text):
    return render(CHAT, [Message('user', 'Hi'), Message('assistant', text)], system=None, train='assistant')


def same(rows, others):
    for one, other in zip(rows, others, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), strict=True)
    return True


@pytest.mark.parametrize('texts', [[], ['Yes.'], ['Yes.', 'No, never.', 'É']])
def test_rows_are_rendered_once(tmp_path, texts):
    rows = [row(text) for text in texts]
    first, counts = kept_rows(tmp_path / 'rows.npz', lambda: (rows, COUNTS))
    assert (first, counts) == (rows, COUNTS)
    again, counts = kept_rows(tmp_path / 'rows.npz', lambda: pytest.fail('rendered twice'))
    assert same(again, rows)
    assert counts == COUNTS
    assert [path.name for path in tmp_path.iterdir()] == ['rows.npz']


def test_pairs_are_rendered_once(tmp_path):
    pairs = [PreferenceRow(row('Yes.'), row('No, never.')), PreferenceRow(row('É'), row('e'))]
    kept_pairs(tmp_path / 'rows.npz', lambda: (pairs, COUNTS))
    again, counts = kept_pairs(tmp_path / 'rows.npz', lambda: pytest.fail('rendered twice'))
    assert counts == COUNTS
    assert same([pair.chosen for pair in again], [pair.chosen for pair in pairs])
    assert same([pair.rejected for pair in again], [pair.rejected for pair in pairs])


def test_a_damaged_file_is_named_and_rendered_again(tmp_path, capsys):
    path = tmp_path / 'rows.npz'
    kept_rows(path, lambda: ([row('Yes.')], COUNTS))
    for content in (path.read_bytes()[:100], b'', b'not this'):
        path.write_bytes(content)
        again, counts = kept_rows(path, lambda: ([row('Yes.')], COUNTS))
        assert same(again, [row('Yes.')])
        assert counts == COUNTS
        assert f'{path}: expected the rows of this stage, found' in capsys.readouterr().out
        kept_rows(path, lambda: pytest.fail('rendered twice'))


def test_rows_that_cannot_be_kept_are_said_and_the_stage_goes_on(tmp_path, capsys):
    path = tmp_path / 'missing' / 'rows.npz'
    rows, counts = kept_rows(path, lambda: ([row('Yes.')], COUNTS))
    assert same(rows, [row('Yes.')])
    assert counts == COUNTS
    assert f'{path}: not written (No such file or directory); a resumed stage' in capsys.readouterr().out
