"""The options of a public function as its source text declares them: names, types and choices, without running it.

``inspect.signature`` would say the same, but needs the function, and with it torch: two seconds and 200 MB that a run
with nothing left to do must not take.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import mapconv

_PLAIN = {"str": str, "bool": bool, "int": int, "float": float, "None": type(None)}
_WORDS = {"str": "a text", "bool": "true or false", "int": "a whole number", "float": "a number", "Path": "a path"}


@dataclass(frozen=True)
class Option:
    """One parameter of a function; ``kinds`` are the alternatives of its annotation (empty: anything goes).

    Whole numbers are counts and sizes: at least 1, or 0 where that is the default.
    """

    name: str
    required: bool
    kinds: tuple[ast.expr, ...]
    minimum: int = 1

    @property
    def is_path(self) -> bool:
        return any(isinstance(kind, ast.Name) and kind.id == "Path" for kind in self.kinds)

    def fault(self, value: Any) -> str | None:
        """What was expected instead of ``value``, or None if it fits."""
        if type(value) is int and value < self.minimum:
            return f"a number of at least {self.minimum}"
        if not self.kinds or any(_fits(kind, value) for kind in self.kinds):
            return None
        return " or ".join(dict.fromkeys(map(_word, self.kinds)))


@cache
def options_of(function: str) -> Mapping[str, Option]:
    """The parameters of ``mapconv.<function>``, by name."""
    module = mapconv._HOMES[function]
    tree = _tree(module)
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    positional = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(positional) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return {
        argument.arg: Option(
            argument.arg,
            required=default is None,
            kinds=tuple(_alternatives(argument.annotation, module)),
            minimum=0 if isinstance(default, ast.Constant) and default.value in (0, 0.0) else 1,
        )
        for argument, default in pairs
    }


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(find_spec(module).loader.get_source(module))


def _alternatives(node: ast.expr | None, module: str) -> list[ast.expr]:
    """The parts of a union; a name that another of our modules defines is looked up there."""
    if node is None:
        return []
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left, module), *_alternatives(node.right, module)]
    if isinstance(node, ast.Name) and node.id not in {*_PLAIN, "Path"}:
        home, value = _definition(node.id, module)
        return _alternatives(value, home) if value is not None else [node]
    return [node]


def _definition(name: str, module: str) -> tuple[str, ast.expr | None]:
    """Where an alias such as ``Direction`` is assigned, and to what."""
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node.value
        ours = isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "mapconv"
        if ours and any(alias.name == name for alias in node.names):
            return _definition(name, node.module)
    return module, None


def _fits(kind: ast.expr, value: Any) -> bool:
    if isinstance(kind, ast.Constant):
        return kind.value is None and value is None
    if isinstance(kind, ast.Subscript):
        name, inside = kind.value.id, kind.slice
        if name == "Literal":
            return any(type(value) is type(choice) and value == choice for choice in ast.literal_eval(_tuple(inside)))
        if name in ("Sequence", "list", "tuple"):
            element = inside.elts[0] if isinstance(inside, ast.Tuple) else inside
            parts = _alternatives(element, "mapconv")
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            return is_list and all(any(_fits(part, item) for part in parts) for item in value)
        return True
    if isinstance(kind, ast.Name):
        if kind.id == "Path":
            return isinstance(value, str)
        if kind.id == "float":
            return type(value) in (int, float) and math.isfinite(value)
        # bool is an int to isinstance, and `rank: true` must not pass for 1.
        return type(value) is _PLAIN[kind.id] if kind.id in _PLAIN else True
    return True


def _word(kind: ast.expr) -> str:
    if isinstance(kind, ast.Constant):
        return "null"
    if isinstance(kind, ast.Subscript) and kind.value.id == "Literal":
        return " or ".join(str(choice) for choice in ast.literal_eval(_tuple(kind.slice)))
    if isinstance(kind, ast.Subscript):
        return f"a list ({ast.unparse(kind)})"
    return _WORDS.get(kind.id, ast.unparse(kind))


def _tuple(node: ast.expr) -> ast.expr:
    return node if isinstance(node, ast.Tuple) else ast.Tuple([node], ast.Load())
