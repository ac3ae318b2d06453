"""Configs become dataclasses strictly; every mistake is named by its dotted field."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import hypothesis
import ml_collections
import pytest
from absl import flags
from hypothesis import strategies as st
from ml_collections import config_flags
from ml_collections.config_dict import placeholder

from simrl.run import config


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    steps: int = 3
    kind: Literal['cosine', 'linear'] = 'cosine'

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f'Inner.steps: expected at least 1, found {self.steps}')


@dataclasses.dataclass(frozen=True)
class Middle:
    size: int
    inner: Inner | None = None
    names: tuple[str, ...] = ('usual',)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    flag: bool
    names: tuple[str, ...] = ()
    rates: tuple[float, ...] | None = None
    parts: dict[str, Inner] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    mode: Literal['a', 'b'] | None = None
    path: pathlib.Path = pathlib.Path('here')
    elsewhere: pathlib.Path | None = None
    maybe: Inner | None = None
    deeper: Middle | None = None


def good() -> dict:
    return {'inner': {'rate': 0.5}, 'flag': True}


def parse(updates: dict, remove: tuple[str, ...] = ()) -> Outer:
    values = {key: value for key, value in (good() | updates).items() if key not in remove}
    return config.from_config_dict(Outer, ml_collections.ConfigDict(values), 'config.outer')


def test_fills_in_nested_fields_and_defaults() -> None:
    outer = parse(
        {
            'names': ('a', 'b'),
            'rates': [3, 4.5],
            'parts': {'x': {'rate': 1, 'kind': 'linear'}},
            'limit': 7,
            'mode': 'b',
            'path': 'there',
            'maybe': {'rate': 0.25},
        }
    )
    assert outer == Outer(
        inner=Inner(rate=0.5),
        flag=True,
        names=('a', 'b'),
        rates=(3.0, 4.5),
        parts={'x': Inner(rate=1.0, kind='linear')},
        limit=7,
        mode='b',
        path=pathlib.Path('there'),
        maybe=Inner(rate=0.25),
    )
    assert type(outer.parts['x'].rate) is float  # an int where a float is expected is converted
    assert outer.rates is not None
    assert type(outer.rates[0]) is float
    assert parse({}) == Outer(inner=Inner(rate=0.5), flag=True)


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, rate=st.integers(-9, 9) | finite, steps=st.integers(1))
names = st.lists(st.text()).map(tuple)
paths = st.sampled_from([pathlib.Path('a/b'), pathlib.Path('/c')])
outers = st.builds(
    Outer,
    inner=inners,
    names=names,
    rates=st.none() | st.lists(finite).map(tuple),
    parts=st.dictionaries(st.text('ab-_', min_size=1), inners),
    path=paths,
    elsewhere=st.none() | paths,
    maybe=st.none() | inners,
    deeper=st.none() | st.builds(Middle, inner=st.none() | inners, names=names),
)


@hypothesis.given(outers)
def test_a_config_of_a_dataclass_gives_it_back(outer: Outer) -> None:
    back = config.from_config_dict(Outer, config.to_config_dict(outer), 'config')
    assert back == outer
    assert list(back.parts) == list(outer.parts)  # in their order


def flagged(settings: Outer, *overrides: str) -> Outer:
    """`settings` after flags, as in `simrl.main`."""
    values, command = flags.FlagValues(), ['simrl', *overrides]
    config_flags.DEFINE_config_dict('config', config.to_config_dict(settings), flag_values=values, sys_argv=command)
    values(command)
    return config.from_config_dict(Outer, values['config'].value, 'config')


def test_flags_set_every_kind_of_field() -> None:
    settings = Outer(Inner(rate=1), flag=True, parts={'some-name': Inner(rate=0.5)})
    assert flagged(
        settings,
        '--config.inner.rate=0.25',  # the file says 1
        '--noconfig.flag',
        "--config.names=('a', 'b')",
        '--config.rates=(1, 2.5)',
        "--config.parts['some-name'].kind=linear",
        '--config.limit=3',
        '--config.mode=b',
        '--config.path=there',
        '--config.elsewhere=further',
        '--config.maybe.rate=0.125',
        '--config.deeper.size=4',
        '--config.deeper.inner.rate=2.0',
    ) == Outer(
        Inner(rate=0.25),
        flag=False,
        names=('a', 'b'),
        rates=(1.0, 2.5),
        parts={'some-name': Inner(rate=0.5, kind='linear')},
        limit=3,
        mode='b',
        path=pathlib.Path('there'),
        elsewhere=pathlib.Path('further'),
        maybe=Inner(rate=0.125),  # its other fields have their defaults
        deeper=Middle(size=4, inner=Inner(rate=2.0)),
    )
    assert flagged(settings) == settings
    with pytest.raises(KeyError, match='other_name'):
        flagged(settings, '--config.parts.other_name.rate=1.0')
    with pytest.raises(flags.IllegalFlagValueError, match='many'):
        flagged(settings, '--config.limit=many')


def test_a_dataclass_that_may_be_none_is_none_where_its_fields_are() -> None:
    """One that is set asks for the others that are needed."""
    unset = {'rate': placeholder(float), 'steps': placeholder(int)}
    assert parse({'maybe': unset}).maybe is None
    assert parse({'maybe': unset | {'rate': 0.5}}).maybe == Inner(rate=0.5)
    with pytest.raises(config.ConfigError, match=r'config\.outer\.maybe\.rate: expected float, found None'):
        parse({'maybe': unset | {'steps': 2}})
    with pytest.raises(config.ConfigError, match=r'config\.outer\.inner\.rate: expected float, found None'):
        parse({'inner': unset})  # this one may not
    with pytest.raises(config.ConfigError, match=r'config\.outer\.maybe\.rate: missing'):
        parse({'maybe': {}})


def test_plain_and_frozen_dicts_are_configs_too() -> None:
    expected = Outer(inner=Inner(rate=0.5), flag=True)
    assert config.from_config_dict(Outer, good(), 'config') == expected
    assert config.from_config_dict(Outer, ml_collections.FrozenConfigDict(good()), 'config') == expected


@pytest.mark.parametrize(
    ('updates', 'message'),
    [
        ({'flagg': 1}, r"config\.outer\.flagg: unknown field \(did you mean 'flag'\?\); Outer has inner, flag, names"),
        ({'inner': {'rate': 1.0, 'speed': 2}}, r'config\.outer\.inner\.speed: unknown field; Inner has rate, steps'),
        ({'inner': {}}, r'config\.outer\.inner\.rate: missing; Inner needs rate'),
        ({'inner': 3}, r'config\.outer\.inner: expected the fields of Inner, found 3 \(int\)'),
        ({'inner': {'rate': '1'}}, r"config\.outer\.inner\.rate: expected float, found '1' \(str\)"),
        ({'inner': {'rate': float('nan')}}, r'config\.outer\.inner\.rate: expected a finite number, found nan'),
        ({'rates': (1, float('inf'))}, r'config\.outer\.rates\[1\]: expected a finite number, found inf'),
        ({'rates': (-(10**400),)}, r'config\.outer\.rates\[0\]: expected a finite number, found -1000'),
        ({'path': 's3://bucket/x'}, r"config\.outer\.path: expected a local path, found the URL 's3://bucket/x'"),
        ({'elsewhere': ''}, r"config\.outer\.elsewhere: expected a path, found ''"),
        ({'inner': {'rate': True}}, r'config\.outer\.inner\.rate: expected float, found True \(bool\)'),
        ({'inner': {'rate': 1, 'steps': 2.0}}, r'config\.outer\.inner\.steps: expected int, found 2\.0 \(float\)'),
        ({'inner': {'rate': 1, 'steps': False}}, r'config\.outer\.inner\.steps: expected int, found False \(bool\)'),
        ({'inner': {'rate': 1, 'kind': 'sine'}}, r"inner\.kind: expected one of 'cosine', 'linear', found 'sine'"),
        ({'flag': 1}, r'config\.outer\.flag: expected bool, found 1 \(int\)'),
        ({'names': 'ab'}, r"config\.outer\.names: expected tuple\[str, \.\.\.\], found 'ab' \(str\)"),
        ({'names': ('a', 3)}, r'config\.outer\.names\[1\]: expected str, found 3 \(int\)'),
        ({'rates': (1, 'x')}, r"config\.outer\.rates\[1\]: expected float, found 'x' \(str\)"),
        ({'rates': 1.5}, r'config\.outer\.rates: expected tuple\[float, \.\.\.\] or None, found 1\.5 \(float\)'),
        ({'parts': 3}, r'config\.outer\.parts: expected dict\[str, .*Inner\], found 3 \(int\)'),
        ({'parts': {'x': {'rate': 'y'}}}, r"config\.outer\.parts\.x\.rate: expected float, found 'y' \(str\)"),
        ({'limit': 'x'}, r"config\.outer\.limit: expected int or None, found 'x' \(str\)"),
        ({'mode': 'c'}, r"config\.outer\.mode: expected one of 'a', 'b' or None, found 'c'"),
        ({'maybe': 3}, r'config\.outer\.maybe: expected the fields of Inner or None, found 3 \(int\)'),
        ({'path': 3}, r'config\.outer\.path: expected a path, found 3 \(int\)'),
        ({'maybe': {'rate': None, 'steps': 1}}, r'config\.outer\.maybe\.rate: expected float, found None \(NoneType\)'),
        # What the dataclass itself refuses carries the dots as well.
        ({'inner': {'rate': 1, 'steps': 0}}, r'^config\.outer\.inner\.steps: expected at least 1, found 0$'),
    ],
)
def test_mistakes_are_named(updates: dict, message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        parse(updates)


@pytest.mark.parametrize(
    ('path', 'found'),
    [
        ('~/runs/x', '/home/me/runs/x'),
        ('~', '/home/me'),
        (pathlib.Path('~/x'), '/home/me/x'),
        ('runs/~/x', 'runs/~/x'),
        ('gs', 'gs'),
        ('a b/seeds=[0, 1]/c:d', 'a b/seeds=[0, 1]/c:d'),
        ('/gs://x', '/gs:/x'),
    ],
)
def test_paths_are_local_and_in_the_home_folder(path, found, monkeypatch) -> None:
    monkeypatch.setenv('HOME', '/home/me')
    assert config.local_path(path) == pathlib.Path(found)


@pytest.mark.parametrize('url', ['gs://b/run', 's3://b', 'hdfs://h:1/x', 'file:///x', 'file:x', pathlib.Path('gs://b')])
def test_a_url_is_no_path(url) -> None:
    with pytest.raises(ValueError, match='expected a local path, found the URL '):
        config.local_path(url)
    with pytest.raises(ValueError, match="expected a path, found '~nobody-of-this-name'"):
        config.local_path('~nobody-of-this-name')


@pytest.mark.parametrize('path', ['$SCRATCH/x', '${HOME}/runs', 'runs/$USER', '/a/$x/b', pathlib.Path('$A')])
def test_a_variable_that_no_shell_has_expanded_is_no_path(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"expected a path, found '.*': \$[\w{}]+ is not expanded here"):
        config.local_path(path)
    for name in ('cash$', 'C$/x', 'price$5', '$'):
        assert config.local_path(name) == pathlib.Path(name)
    (tmp_path / '$name').mkdir()
    assert config.local_path('$name/new') == pathlib.Path('$name/new')


def test_fields_that_change_no_result_are_declared_where_they_are_defined() -> None:
    @dataclasses.dataclass(frozen=True)
    class Passes:
        steps: int
        at_once: int = dataclasses.field(default=8, metadata=config.NO_EFFECT)

    settings = {'passes': Passes(3), 'seed': 0, 'parts': (Passes(1, 2),)}
    assert config.identity(settings) == {'passes': {'steps': 3}, 'seed': 0, 'parts': [{'steps': 1}]}
    assert config.to_dict(settings)['passes'] == {'steps': 3, 'at_once': 8}


def test_missing_fields_are_listed() -> None:
    with pytest.raises(config.ConfigError, match=r'config\.outer\.inner: missing; Outer needs inner, flag'):
        parse({}, remove=('inner', 'flag'))


@pytest.mark.parametrize('kind', [complex, int | str, tuple[int, float], list[int], dict[int, str]])
def test_a_field_type_that_cannot_be_read_is_the_programmers_error(kind: Any) -> None:
    odd = dataclasses.make_dataclass('Odd', [('field', kind)])
    with pytest.raises(TypeError, match='fields of type'):
        config.from_config_dict(odd, {'field': 1}, 'config')


def test_to_dict_goes_through_json_and_back() -> None:
    outer = parse({'names': ('a',), 'parts': {'x': {'rate': 1}}, 'path': 'there'})
    stored = json.loads(json.dumps(config.to_dict(outer)))
    assert config.from_config_dict(Outer, stored, 'config') == outer
    assert config.to_dict(ml_collections.ConfigDict(good())) == good()
    with pytest.raises(TypeError, match='JSON'):
        config.to_dict({'x': object()})


def test_differences_names_dotted_fields() -> None:
    old = {'a': {'b': 1, 'c': [1, 2]}, 'd': 1, 'gone': 'x', 'same': 1}
    new = {'a': {'b': 2, 'c': [1, 3]}, 'd': True, 'new': None, 'same': 1.0}
    assert config.differences(old, new) == [
        'a.b: 1 -> 2',
        'a.c: [1, 2] -> [1, 3]',
        'd: 1 -> True',
        "gone: 'x' -> (absent)",
        'new: (absent) -> None',
    ]
    assert config.differences(old, old) == []
