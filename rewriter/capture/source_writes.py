"""Which tensors the code of a model may write into, read from its source.

    self.queue[i] = k      self.mean.mul_(0.9)      self.count += 1      torch.add(a, b, out=self.sum)
    q = self.queue; q[i] = k                        update(self.queue, k), where `update` writes into its argument

Names are what counts, whoever holds them: `self.child.queue[i] = k` writes every `queue`. Rebinding (`self.queue = q`)
changes a module and no tensor, so it does not count. Does not see a write inside a compiled extension whose name does
not say so (a trailing underscore, batch and instance normalisation).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

_WRITERS = {"batch_norm", "instance_norm", "fused_moving_avg_obs_fake_quant"}
_VIEWS = {"narrow", "select", "split", "chunk", "transpose", "t", "permute", "squeeze", "unsqueeze", "view_as_real",
          "unbind", "flatten", "diagonal", "detach", "as_strided", "getattr"}  # fmt: skip
_FRESH = {"clone", "repeat", "item", "tolist", "size", "sum", "mean", "numel"}


def written(classes: Iterable[type], names: set[str]) -> set[str]:
    """Those of `names` that some function of the classes may write into."""
    found: set[str] = set()
    functions = {f for cls in classes for base in cls.__mro__ for f in _functions(base)}
    for function in functions:
        if mentioned := names & _mentions(function.__code__):
            effects = _effects(function)
            found |= mentioned if effects is None else mentioned & effects
    return found


def _functions(cls: type) -> list[FunctionType]:
    if cls in (nn.Module, object):
        return []
    members = [inspect.unwrap(getattr(m, "__func__", getattr(m, "fget", m))) for m in vars(cls).values()]
    return [m for m in members if isinstance(m, FunctionType) and m.__name__ != "__init__"]


def _mentions(code: CodeType) -> set[str]:
    inner = [_mentions(c) for c in code.co_consts if isinstance(c, CodeType)]
    return {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}.union(*inner)


@functools.lru_cache(maxsize=4096)
def _effects(function: FunctionType) -> frozenset[str] | None:
    """Names of attributes and of own parameters that a function writes into; None where its source is not known."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    walk = _Walk(function)
    size = -1
    while len(walk.found) + sum(map(len, walk.aliases.values())) > size:  # loops: an alias may be set below its use
        size = len(walk.found) + sum(map(len, walk.aliases.values()))
        walk.visit(tree)
    return frozenset(walk.found)


class _Walk(ast.NodeVisitor):
    def __init__(self, function: FunctionType) -> None:
        self.globals = function.__globals__
        self.found: set[str] = set()
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        self.aliases: dict[str, set[str]] = {name: {name} for name in names if name not in ("self", "cls")}

    def reach(self, node: ast.AST | None) -> set[str]:
        """The names through which an expression reaches memory that was there before."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return {node.attr} | self.reach(node.value)
        if isinstance(node, (ast.Subscript, ast.Starred)):
            index = getattr(node, "slice", None)
            key = {index.value} if isinstance(index, ast.Constant) and isinstance(index.value, str) else set()
            return self.reach(node.value) | key
        if isinstance(node, (ast.Tuple, ast.List)):
            return set().union(*map(self.reach, node.elts))
        if isinstance(node, ast.IfExp):
            return self.reach(node.body) | self.reach(node.orelse)
        if isinstance(node, ast.BoolOp):
            return set().union(*map(self.reach, node.values))
        if isinstance(node, ast.Call):
            name = _last(node.func)
            if self._is_function(node.func):
                texts = {a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
                return self.reach(node.args[0]) | texts if name in _VIEWS and node.args else set()
            return set() if name in _FRESH else self.reach(node.func)
        return set()

    def _is_function(self, func: ast.AST) -> bool:
        """Whether a call is of a function, and not of a method of a value."""
        while isinstance(func, ast.Attribute):
            func = func.value
            if isinstance(func, ast.Name) and isinstance(self.globals.get(func.id), ModuleType):
                return True
        return isinstance(func, ast.Name) and func.id not in self.aliases and func.id != "self"

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self._bind(element, value)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, value)
        elif isinstance(target, ast.Name):
            self.aliases.setdefault(target.id, set()).update(self.reach(value))
        elif isinstance(target, ast.Subscript):
            self.found |= self.reach(target.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.found |= self.reach(node.target)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _last(node.func)
        for keyword in node.keywords:
            if keyword.arg == "out":
                self.found |= self.reach(keyword.value)
        given = [*node.args, *(k.value for k in node.keywords)]
        if name in _WRITERS or (name.endswith("_") and not name.endswith("__")):
            self.found |= set().union(*map(self.reach, given if self._is_function(node.func) else [node.func]))
        elif isinstance(node.func, ast.Name) and isinstance(callee := self.globals.get(name), FunctionType):
            self._called(node, inspect.unwrap(callee))
        self.generic_visit(node)

    def _called(self, node: ast.Call, callee: Any) -> None:
        """What a helper of the same library writes into its arguments."""
        effects = None if callee.__module__.partition(".")[0] == "torch" else _shallow(callee)
        if effects is None:
            return
        names = callee.__code__.co_varnames[: callee.__code__.co_argcount]
        pairs = [*zip(names, node.args, strict=False), *((k.arg, k.value) for k in node.keywords if k.arg)]
        self.found |= set().union(*(self.reach(value) for name, value in pairs if name in effects))


_running: set[FunctionType] = set()


def _shallow(callee: FunctionType) -> frozenset[str] | None:
    """`_effects`, but nothing for a function that calls itself."""
    if callee in _running:
        return frozenset()
    _running.add(callee)
    try:
        return _effects(callee)
    finally:
        _running.discard(callee)


def _last(func: ast.AST) -> str:
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
