"""A profile's times go to the scopes that operations were traced in, each once."""

import os
import pathlib
import subprocess
import sys

import pytest

from tools import profile_summary as tool
from tools.profile_summary import Event, Operation

# In a process of its own, for the profiler's sake: which plugins of JAX it asks is settled as a process starts.
PROFILED = """
import sys
import jax, jax.numpy as jnp

def loss(w, x):
    @jax.checkpoint
    def layer(x, _):
        with jax.named_scope('deep/attention'):
            x = x @ w
        with jax.named_scope('mlp'):
            return jnp.sin(jnp.exp(jnp.tanh(x))), None

    with jax.named_scope('update'):
        x, _ = jax.lax.scan(layer, x, length=5)
        with jax.named_scope('logits'):
            return jax.lax.sort(x @ w).sum()

@jax.jit
def learn(w, x):
    with jax.named_scope('passes'):
        return jax.grad(loss)(w, x)

@jax.jit
def decode(x):
    def cond(carry):
        return carry[0] < 7
    def step(carry):
        with jax.named_scope('sample'):
            return carry[0] + 1, jnp.argsort(carry[1] * 1.5)
    return jax.lax.while_loop(cond, step, (0, x))

w = x = jnp.ones((200, 200)) * 0.01
arguments = jnp.arange(5000.0)
for _ in range(2):
    jax.block_until_ready((learn(w, x), decode(arguments.astype(int))))
    if _ == 0:
        jax.profiler.start_trace(sys.argv[1])
jax.profiler.stop_trace()
"""


@pytest.fixture(scope='module')
def profile(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('profile')
    subprocess.run([sys.executable, '-c', PROFILED, str(folder)], check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    return folder


def rows(text: str, title: str) -> dict[str, tuple[float, float, int]]:
    """A table by the name of its rows: per cent, milliseconds, events."""
    (found,) = [part for part in text.split('\n\n') if part.startswith(f'| {title} |')]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in found.splitlines()[2:]]
    return {name: (float(share), float(ms), int(events)) for name, share, ms, events in cells}


def test_times_by_scope_kind_and_program(profile: pathlib.Path) -> None:
    text = tool.summary(tool.newest(profile), top=100)
    scopes, kinds, programs = (rows(text, title) for title in ('scope', 'kind', 'program'))
    for table in (scopes, kinds, programs):
        assert sum(share for share, _, _ in table.values()) == pytest.approx(100, abs=0.06 * len(table))
        assert sum(events for _, _, events in table.values()) == sum(events for _, _, events in scopes.values())
    attention = 'passes/update/deep/attention'
    for scope in (attention, f'{attention} (backward)', f'{attention} (recomputed)'):
        assert scopes[scope][2] % 5 == 0, scope  # a layer's, five times
    assert {'passes/update/logits', 'passes/update/logits (backward)'} <= set(scopes)
    assert scopes['sample'][2] % 7 == 0
    assert tool.UNKNOWN not in scopes
    assert set(programs) <= {'jit_learn', 'jit_decode', 'jit_convert_element_type'}
    assert any('dot' in kind for kind in kinds)
    assert any('sort' in kind for kind in kinds)
    # What is a product, or a sort, is not a loop's: a loop's own time is next to nothing.
    assert kinds['while'][0] < 20
    assert sum(share for kind, (share, _, _) in kinds.items() if 'dot' in kind or 'sort' in kind) > kinds['while'][0]


def test_the_longest_first_and_the_rest_in_one_row(profile: pathlib.Path) -> None:
    whole = rows(tool.summary(tool.newest(profile), top=100), 'scope')
    assert [share for share, _, _ in whole.values()] == sorted((share for share, _, _ in whole.values()), reverse=True)
    cut = rows(tool.summary(tool.newest(profile), top=2), 'scope')
    assert list(cut)[:2] == list(whole)[:2]
    (rest,) = list(cut)[2:]
    assert rest == f'({len(whole) - 2} others)'
    assert cut[rest][2] == sum(events for _, _, events in list(whole.values())[2:])


def test_as_a_command(profile: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, 'argv', ['profile_summary', str(profile), '--top=3'])
    tool.main()
    assert '| scope | % | ms | events |' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['profile_summary', str(tmp_path)])
    with pytest.raises(SystemExit, match=r'expected a profile, \*\.xplane\.pb, found none'):
        tool.main()


SCOPES = {
    'jit(f)/dot_general': '(no scope)',
    'jit(f)/outer/jit(softmax)/exp': 'outer',
    'jit(f)/rollout/decode/while/body/closed_call/attention/dot_general': 'rollout/decode/attention',
    'jit(f)/decode/while/body/eval_jaxpr/attention/dot_general': 'decode/attention',  # from JAX 0.12 on
    'jit(f)/jvp(update/passes)/mlp/mul': 'update/passes/mlp',
    'jit(f)/transpose(jvp(update/passes))/mlp/mul': 'update/passes/mlp (backward)',
    'jit(f)/transpose(jvp(a))/while/body/checkpoint/rematted_computation/b/mul': 'a/b (recomputed)',
    'jit(f)/jvp()/vmap(a)/cond/branch_1_fun/add': 'a',
    'jit(f)/jit(main)/a/custom_jvp_call/custom_vjp_call/add': 'a',
    'jit(f)/logits/transpose(jvp(...d,vd->...v))/dot_general': 'logits (backward)',
    'jit(f)/a/bkgts,bksh->btkgh/dot_general': 'a',
    '': '(no scope)',
}


@pytest.mark.parametrize('op_name', SCOPES)
def test_scopes_are_what_jax_did_not_add(op_name: str) -> None:
    assert tool.scope_of(op_name) == SCOPES[op_name]


def test_a_time_is_an_operations_own() -> None:
    """Without the events inside; those that touch are side by side."""

    def event(name: str, start: float, end: float) -> Event:
        return Event(start, end - start, Operation('p', name, 'k'))

    line = [event('inner', 3, 5), event('loop', 0, 10), event('body', 1, 6), event('body', 6, 9), event('next', 10, 12)]
    found = tool.totals([line, [event('loop', 0, 4)]], lambda operation: operation.scope)
    assert {name: total.nanoseconds for name, total in found.items()} == {'loop': 6, 'body': 6, 'inner': 2, 'next': 2}
    assert found['body'].events == found['loop'].events == 2


def test_bytes_that_are_no_protocol_buffer() -> None:
    assert list(tool.fields(b'\x08\x96\x01\x12\x02ab')) == [(1, 150), (2, b'ab')]
    with pytest.raises(ValueError, match='expected a protocol buffer, found wire type 7'):
        list(tool.fields(b'\x0f'))
