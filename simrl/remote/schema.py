"""Strict JSON against a small subset of JSON Schema.

Stricter than the standard where a judge could be misread: an integer is written as one (7.0 is none), no name occurs
twice in an object, and NaN and Infinity are no numbers.
"""

import json
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

TYPES: dict[str, tuple[type, ...]] = {
    'object': (dict,),
    'array': (list,),
    'string': (str,),
    'integer': (int,),
    'number': (int, float),
    'boolean': (bool,),
    'null': (type(None),),
}
KEYWORDS = {
    'object': {'properties', 'required', 'additionalProperties'},
    'array': {'items', 'minItems', 'maxItems'},
    'string': {'minLength', 'maxLength'},
    'integer': {'minimum', 'maximum'},
    'number': {'minimum', 'maximum'},
    'boolean': set[str](),
    'null': set[str](),
}
BOUNDS = {  # keyword -> the size that it bounds, and whether from below
    'minLength': ('characters', True),
    'maxLength': ('characters', False),
    'minItems': ('items', True),
    'maxItems': ('items', False),
    'minimum': ('', True),
    'maximum': ('', False),
}


class SchemaError(ValueError):
    """A value that does not fit its schema."""


def object_of(**properties: Schema) -> dict[str, Any]:
    """The schema of an object with just these properties, all required, in this order."""
    return {
        'type': 'object',
        'properties': properties,
        'required': list(properties),
        'additionalProperties': False,
    }


def check_schema(schema: Schema, where: str = 'schema') -> None:
    """Raises ValueError for a schema outside the subset: what is not checked must not seem to be."""
    kind = schema.get('type')
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f'{where}.type: expected one of {", ".join(TYPES)}, found {kind!r}')
    if unknown := sorted(schema.keys() - {'type', 'description', 'enum'} - KEYWORDS[kind]):
        raise ValueError(f'{where}: expected {", ".join(sorted(KEYWORDS[kind])) or "no more"}, found {unknown}')
    if kind == 'object':
        properties = schema.get('properties', {})
        if schema.get('additionalProperties') is not False or set(schema.get('required', ())) != set(properties):
            raise ValueError(f'{where}: expected additionalProperties False and all properties required')
        for name, part in properties.items():
            check_schema(part, f'{where}.{name}')
    if kind == 'array' and 'items' in schema:
        check_schema(schema['items'], f'{where}[]')


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or names a property twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_number)
    except RecursionError:
        raise ValueError('nested too deeply') from None


def check_value(value: Any, schema: Schema, where: str = 'answer') -> None:
    """Raises SchemaError, with the path of the part, if a value does not fit."""
    kind = schema['type']
    fits = isinstance(value, TYPES[kind]) and (kind == 'boolean' or not isinstance(value, bool))
    if not fits:
        raise SchemaError(f'{where}: expected {kind}, found {_shown(value)}')
    if 'enum' in schema and value not in schema['enum']:
        raise SchemaError(f'{where}: expected one of {schema["enum"]}, found {_shown(value)}')
    for keyword, (unit, below) in BOUNDS.items():
        if keyword in schema:
            size = value if unit == '' else len(value)
            if size < schema[keyword] if below else size > schema[keyword]:
                bound = f'at {"least" if below else "most"} {schema[keyword]} {unit}'.rstrip()
                raise SchemaError(f'{where}: expected {bound}, found {_shown(value)}')
    if kind == 'object':
        expected = schema.get('properties', {})
        if value.keys() != expected.keys():
            raise SchemaError(f'{where}: expected just {sorted(expected)}, found {_shown(sorted(value))}')
        for name, part in expected.items():
            check_value(value[name], part, f'{where}.{name}')
    if kind == 'array' and 'items' in schema:
        for i, item in enumerate(value):
            check_value(item, schema['items'], f'{where}[{i}]')


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f'a property occurs twice: {names}')
    return dict(pairs)


def _no_number(name: str) -> Any:
    raise ValueError(f'{name} is no JSON number')


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
