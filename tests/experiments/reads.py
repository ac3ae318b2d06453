"""Which fields of dataclasses a program reads, found in its source by the types that annotations give.

An attribute counts as a read of `C.field` only where what it is an attribute of may be a C: a parameter annotated so, a
field of a dataclass, an attribute that its class was given, or what was made of these by assignment, iteration,
subscripts, `dataclasses.replace` or a call whose return type is annotated. What the types do not show is not seen; nor
is whether a value that is read has an effect, which only a test of that effect shows.
"""

import ast
import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping

Types = frozenset[type]
NONE: Types = frozenset()
CONTAINER_METHODS = ('items', 'values', 'get')  # what they give is made of what the container holds


def dataclasses_in(hint: object) -> Types:
    """The dataclasses that a type hint mentions."""
    own = [hint] if isinstance(hint, type) and dataclasses.is_dataclass(hint) else []
    return frozenset(own).union(*(dataclasses_in(part) for part in typing.get_args(hint)))


def fields_read(sources: Iterable[str], classes: Iterable[type]) -> set[tuple[type, str]]:
    """The fields of `classes` that are read in some source texts, what checks in `__post_init__` read left out."""
    trees = [ast.parse(source) for source in sources]
    reader = _Reader(classes, trees)
    for tree in trees:
        reader.statements(tree.body, {})
    return reader.found


class _Reader:
    def __init__(self, classes: Iterable[type], trees: Iterable[ast.Module]) -> None:
        self.found: set[tuple[type, str]] = set()
        self._kept: dict[str, Types] = {}  # attributes that the class being read was given: self.name = value
        self._hints = {cls: typing.get_type_hints(cls) for cls in classes}
        self._named: dict[str, Types] = {}
        for cls in self._hints:
            self._named[cls.__name__] = self._named.get(cls.__name__, NONE) | {cls}
        self._returned: dict[str, Types] = {}  # by the name of a function, wherever it is
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.FunctionDef):
                self._returned[node.name] = self._returned.get(node.name, NONE) | self._annotated(node.returns)

    def _annotated(self, annotation: ast.expr | None) -> Types:
        """The classes that an annotation names."""
        if annotation is None:
            return NONE
        names = set()
        for node in ast.walk(annotation):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {part.id for part in ast.walk(ast.parse(node.value)) if isinstance(part, ast.Name)}
            elif isinstance(node, ast.Name | ast.Attribute):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
        return NONE.union(*(self._named.get(name, NONE) for name in names))

    def statements(self, body: Iterable[ast.AST], env: dict[str, Types], owner: Types = NONE) -> None:
        """Walks a block; `env` holds the types of names and is added to. `owner`: the class whose body it is."""
        for node in body:
            if isinstance(node, ast.ClassDef):
                self._kept, outer = {}, self._kept
                self.statements(node.body, dict(env), self._named.get(node.name, NONE))
                self._kept = outer
            elif isinstance(node, ast.FunctionDef):
                if node.name != '__post_init__':
                    self._function(node, env, owner)
            else:
                self._statement(node, env)

    def _function(self, node: ast.FunctionDef, env: Mapping[str, Types], owner: Types) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        inner = dict(env) | {argument.arg: self._annotated(argument.annotation) for argument in arguments}
        if owner and arguments:
            inner[arguments[0].arg] = owner
        self.statements(node.body, inner)

    def _statement(self, node: ast.AST, env: dict[str, Types]) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value, env)
        elif isinstance(node, ast.For):
            self._bind(node.target, node.iter, env)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._types(child, env)
            else:
                self.statements([child], env)

    def _bind(self, target: ast.expr, value: ast.expr, env: dict[str, Types]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, its_value in zip(target.elts, value.elts, strict=True):
                self._bind(part, its_value, env)
            return
        types = self._types(value, env)
        if isinstance(target, ast.Attribute):
            self._kept[target.attr] = self._kept.get(target.attr, NONE) | types
        else:
            env.update({name.id: types for name in ast.walk(target) if isinstance(name, ast.Name)})

    def _types(self, node: ast.expr, env: dict[str, Types]) -> Types:
        """The classes that a value may be of, or be made of. Notes what is read on the way."""
        if isinstance(node, ast.Name):
            return env.get(node.id, NONE)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, env)
        if isinstance(node, ast.Call):
            return self._call(node, env)
        if isinstance(node, ast.Lambda):
            self._types(node.body, env | {argument.arg: NONE for argument in node.args.args})
            return NONE
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            inner = dict(env)
            for part in node.generators:
                self._bind(part.target, part.iter, inner)
                for condition in part.ifs:
                    self._types(condition, inner)
            made = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            return NONE.union(*(self._types(part, inner) for part in made))
        inside = [self._types(child, env) for child in _expressions(node)]
        return NONE.union(*inside) if isinstance(node, _MADE_OF_PARTS) else NONE

    def _attribute(self, node: ast.Attribute, env: dict[str, Types]) -> Types:
        owners = self._types(node.value, env)
        holders = [cls for cls in owners if node.attr in self._hints[cls]]
        self.found |= {(cls, node.attr) for cls in holders if isinstance(node.ctx, ast.Load)}
        if not holders:
            return owners if node.attr in CONTAINER_METHODS else self._kept.get(node.attr, NONE)
        inside = NONE.union(*(dataclasses_in(self._hints[cls][node.attr]) for cls in holders))
        return inside & set(self._hints)

    def _call(self, node: ast.Call, env: dict[str, Types]) -> Types:
        function = self._types(node.func, env)
        given = [self._types(argument, env) for argument in node.args]
        for keyword in node.keywords:
            self._types(keyword.value, env)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
        if name in ('replace', 'zip', 'enumerate', 'sorted', 'list', 'tuple', 'product'):
            return NONE.union(*given)
        if name in CONTAINER_METHODS:
            return function
        return self._named.get(name, NONE) | self._returned.get(name, NONE)


_MADE_OF_PARTS = ast.Tuple | ast.List | ast.IfExp | ast.BoolOp | ast.Subscript | ast.Starred | ast.NamedExpr | ast.Dict


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        else:
            yield from _expressions(child)
