"""Structured answers are checked strictly, and a schema outside the subset is refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.remote.schema import SchemaError, check_schema, check_value, object_of, parse_json

REPLY = object_of(
    kind={'type': 'string', 'enum': ['a', 'b']},
    text={'type': 'string', 'minLength': 1, 'maxLength': 3},
    score={'type': 'integer', 'minimum': 0, 'maximum': 10},
    share={'type': 'number'},
    items={'type': 'array', 'items': {'type': 'boolean'}, 'minItems': 1, 'maxItems': 2},
)
GOOD = {'kind': 'a', 'text': 'abc', 'score': 10, 'share': 1, 'items': [True]}


def test_a_value_that_fits() -> None:
    check_schema(REPLY)
    check_value(GOOD, REPLY)


@pytest.mark.parametrize(
    ('change', 'found'),
    [
        ({'kind': 'c'}, r'answer\.kind: expected one of'),
        ({'text': ''}, r'answer\.text: expected at least 1 characters'),
        ({'text': 'abcd'}, r'answer\.text: expected at most 3 characters'),
        ({'score': 10.0}, r'answer\.score: expected integer, found 10\.0'),
        ({'score': True}, r'answer\.score: expected integer, found True'),
        ({'score': '7'}, r"answer\.score: expected integer, found '7'"),
        ({'score': -1}, r'answer\.score: expected at least 0'),
        ({'share': None}, r'answer\.share: expected number, found None'),
        ({'items': []}, r'answer\.items: expected at least 1 items'),
        ({'items': [True, 1]}, r'answer\.items\[1\]: expected boolean, found 1'),
        ({'more': 1}, r'answer: expected just'),
    ],
)
def test_a_value_that_does_not_fit(change: dict[str, Any], found: str) -> None:
    with pytest.raises(SchemaError, match=found):
        check_value(GOOD | change, REPLY)


@pytest.mark.parametrize(
    'schema',
    [
        {},
        {'type': 'text'},
        {'type': ['string', 'null']},
        {'type': 'string', 'pattern': 'a'},
        {'type': 'object', 'properties': {'a': {'type': 'null'}}},
        {'type': 'object', 'properties': {'a': {'type': 'null'}}, 'additionalProperties': False, 'required': []},
        object_of(a={'type': 'string', 'format': 'date'}),
        {'type': 'array', 'items': {'anyOf': []}},
    ],
)
def test_a_schema_outside_the_subset_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='expected'):
        check_schema(schema)


@pytest.mark.parametrize('text', ['', '{', 'NaN', '{"a": -Infinity}', '{"a": 1, "a": 2}', '{"a": 1} 2', '[' * 100_000])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r'.'):
        parse_json(text)


@settings(max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
