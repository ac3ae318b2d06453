"""Floating-point operations of a traced program, of all devices: those of its matrix products, kernels included.

As in `hlo`, a loop whose length only running tells counts one round, under its named scope, and loops of one scope add
up: a round of each. What is recomputed for want of memory counts, as the device does it. Of a kernel's grid all blocks
count, although a causal one skips nearly half.
"""

import collections
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tools.compile_check.hlo import ONCE, scope_of


def operations(jaxpr: Any, within: str = '') -> Mapping[str, float]:
    """Operations by scope: `ONCE` for those of every call.

    Args:
        jaxpr: `traced.jaxpr`, or one within it.
        within: named scopes of the latter.
    """
    found: dict[str, float] = collections.defaultdict(float)
    for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
        for scope, number in _of_equation(equation, within).items():
            found[scope] += number
    return dict(found)


def _of_equation(equation: Any, within: str) -> Mapping[str, float]:
    name, params = equation.primitive.name, equation.params
    path = scope_of(f'{within}/{equation.source_info.name_stack}')
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        shape = equation.invars[0].aval.shape
        inner = math.prod(shape[axis] for axis in contracted)
        return {ONCE: 2.0 * math.prod(equation.outvars[0].aval.shape) * inner}
    if name == 'while':
        inside = dict(operations(params['body_jaxpr'], path))
        own = inside.pop(ONCE, 0.0)
        scope = path or 'loop'
        return inside | ({scope: own + inside.get(scope, 0.0)} if own else {})
    if name == 'cond':
        branches = [operations(branch, path) for branch in params['branches']]
        return {key: max(branch.get(key, 0.0) for branch in branches) for branch in branches for key in branch}
    times, devices = 1.0, 1.0
    if name == 'scan':
        times = params['length']
    elif name == 'shard_map':  # a device's part
        manual = params.get('newly_manual_axes', params.get('manual_axes'))  # versions of JAX differ
        devices = math.prod(params['mesh'].shape[axis] for axis in manual)
    elif name == 'pallas_call':
        times = math.prod(size for size in params['grid_mapping'].grid if isinstance(size, int))
    found: dict[str, float] = collections.defaultdict(float)
    for inner in _jaxprs(params):
        for scope, number in operations(inner, path).items():
            found[scope] += number * devices * (times if scope == ONCE else 1.0)
    return found


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs among an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, 'eqns') or hasattr(one, 'jaxpr'):
                yield one
