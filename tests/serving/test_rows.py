"""Calls of the programs: which rows they have, in which order, and what they are given."""

import itertools

import numpy as np
import pytest

from simrl.rollouts.token_sampling import Sampling
from simrl.serving.generation import Generation
from simrl.serving.rows import Request, Row, common_prefix, decode_call, feed_call
from simrl.serving.shapes import EngineSettings, Shapes
from simrl.serving.text import AnswerText
from tests.serving.scene import CHAT, CONFIG


def rows_of(shapes: Shapes) -> list[Row]:
    """Rows with a request each, which begins with the row's own number."""
    made = []
    for index in range(shapes.rows):
        generation = Generation(prompt=(index, 7, 8, 9), max_tokens=3, sampling=Sampling(), seed=index)
        request = Request(100 - index, generation, lambda event: None, 0.0, AnswerText(CHAT))
        made.append(Row(index, request=request, used=request.number))
    return made


@pytest.mark.parametrize('number', [1, 3, 4])
def test_a_call_of_all_rows_has_them_in_the_order_of_the_cache(number: int) -> None:
    """The programs then read the cache as it is, whatever the numbers of the rows."""
    shapes = EngineSettings(rows=number, context=64, chunk=8, block=2).shapes(CONFIG)
    for fed in itertools.permutations(range(number), min(number, shapes.feed[-1][0])):
        rows = rows_of(shapes)
        call = feed_call([rows[i] for i in fed], rows, shapes)
        given = call.given
        for at, (index, request) in enumerate(zip(given.rows.tolist(), call.requests, strict=True)):
            assert (request is not None) == (index in fed)
            if request is not None:
                assert request is rows[index].request
                assert given.tokens[at, :3].tolist() == [index, 7, 8]
                assert (given.count[at], given.begins[at], given.length[at]) == (3, True, 4)
        decode = decode_call(rows, shapes, CONFIG.padded_vocab_size, ((), 0))
        assert decode is not None
        for of_call in (given.rows, decode.asked.rows):
            assert len(set(of_call.tolist())) == len(of_call)
            assert len(of_call) < number or of_call.tolist() == list(range(number))
        assert [decode.asked.seed[i, 0] for i, x in enumerate(decode.requests) if x is not None] == sorted(fed)
        assert np.flatnonzero(decode.asked.quota).size == len(fed)


def test_common_prefixes_end_where_one_ends_or_differs() -> None:
    for first, second, length in (
        ([], (), 0),
        ([1], (), 0),
        ([1, 2], (1, 2, 3), 2),
        ([1, 2, 5], (1, 3, 5), 1),
        ([4], (5,), 0),
    ):
        assert common_prefix(first, second) == length
