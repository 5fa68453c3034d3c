"""Parents that take a child's tensor without calling the child, told from their source.

    F.linear(x, self.q.weight)                    q.weight   every forward runs it
    if slow: x @ self.q.weight.t()                           maybe: nothing is said
    if slow: ... and no `self.q(x)` anywhere      q.weight   whatever runs, it is not the child

A read of shape, dtype or device is none. What source cannot tell (a local name for the child, a forward captured in a
lambda) is left to the watched first forward (`unreached_sites.py`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..grafted_class import base_class
from ..modules.offloaded import HOOKED

# fmt: off
_METADATA = frozenset((
    "dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad", "requires_grad_", "is_cuda", "is_meta",
    "layout", "grad", "grad_fn", "is_leaf", "new_zeros", "new_empty", "new_ones", "new_full", "new_tensor",
    "is_contiguous", "element_size", "data_ptr", "stride", "itemsize", "nbytes", "type", "is_floating_point",
    "is_quantized", "untyped_storage", "storage", "names", "__class__", "is_sparse",
))
_LOOKS = frozenset((
    "isinstance", "issubclass", "len", "id", "print", "hasattr", "getattr", "type", "repr", "str", "type_as", "to",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "is_tensor", "is_floating_point",
))
# fmt: on


_PLAIN = (ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)


@functools.lru_cache(maxsize=2048)
def reads(cls: type[nn.Module], attribute: str) -> frozenset[str]:
    """Dotted names, from the parent on, of the children's tensors that a parent takes instead of calling the child."""
    if not any(_mentions(function.__code__, attribute) for function in _methods(cls)):
        return frozenset()  # reading and parsing source takes milliseconds
    return _certain(cls) | _never_called(cls, attribute)  # type: ignore[arg-type]


def _mentions(code: types.CodeType, attribute: str) -> bool:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return attribute in code.co_names or any(_mentions(const, attribute) for const in inner)


@functools.lru_cache(maxsize=2048)
def _certain(cls: type[nn.Module]) -> frozenset[str]:
    return frozenset(_of_method(cls, "forward", set()))


@functools.lru_cache(maxsize=2048)
def _never_called(cls: type[nn.Module], attribute: str) -> frozenset[str]:
    """What methods of the class read of children that none of them calls, or hands to anything that might.

    Nothing for a forward that hands the module itself on, as those of diffusers do to a processor, which calls them."""
    if _hands_itself_on(cls):
        return frozenset()
    reads: set[str] = set()
    used: set[str] = set()
    functions = list(_methods(cls))
    reading = [function for function in functions if _mentions(function.__code__, attribute)]
    for function in reading:
        _note_uses(function, reads, used)
    children = {read.partition(".")[0] for read in reads} - used
    for function in functions:
        if function not in reading and any(_mentions(function.__code__, child) for child in children):
            _note_uses(function, set(), used)
    return frozenset(read for read in reads if read.partition(".")[0] not in used)


def _hands_itself_on(cls: type[nn.Module]) -> bool:
    """Whether the forward gives the module to something that may do anything with it."""
    tree = _parsed(inspect.unwrap(getattr(cls, "forward", None) or nn.Module.forward))
    if tree is None or not tree.args.args:
        return False
    me = tree.args.args[0].arg
    given = (
        value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and _called(call.func) not in _LOOKS
        for value in (*call.args, *(keyword.value for keyword in call.keywords))
    )
    return any(isinstance(value, ast.Name) and value.id == me for value in given)


@functools.lru_cache(maxsize=2048)
def _anywhere(cls: type[nn.Module], attribute: str) -> frozenset[str]:
    """What any method of the class reads of children."""
    found: set[str] = set()
    for function in _methods(cls):
        if _mentions(function.__code__, attribute):
            _note_uses(function, found, set())
    return frozenset(found)


def _note_uses(function: Any, reads: set[str], used: set[str]) -> None:
    """Add to `reads` the children's attributes that a method reads, to `used` the children it does more with."""
    tree = _parsed(function)
    if tree is None or not tree.args.args:
        return
    me = tree.args.args[0].arg
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        chain = _chain(node, me)
        if chain is None or len(chain) != 1:
            continue
        child, outer = chain[0], parents[node]
        if isinstance(outer, ast.Attribute) and not _METADATA.isdisjoint((outer.attr,)):
            continue
        if isinstance(outer, ast.Attribute) and isinstance(outer.ctx, ast.Load):
            further = parents[outer]
            if isinstance(further, ast.Call) and further.func is outer:
                used.add(child)
            elif not (isinstance(further, ast.Attribute) and further.attr in _METADATA):
                reads.add(f"{child}.{outer.attr}")
        elif not (isinstance(outer, ast.Call) and _called(outer.func) in _LOOKS and node is not outer.func):
            used.add(child)


def _methods(cls: type[nn.Module]) -> Iterator[Any]:
    """The functions of a class and its bases, but those that make it."""
    for base in cls.__mro__:
        if base not in (nn.Module, object):
            for name, value in vars(base).items():
                function = inspect.unwrap(value) if inspect.isfunction(value) else None
                if inspect.isfunction(function) and not name.startswith(("__init__", "_init", "init_", "reset_")):
                    yield function


def _parsed(function: Any) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source: made at run time
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _of_method(cls: type[nn.Module], name: str, seen: set[str]) -> Iterator[str]:
    function = inspect.unwrap(getattr(cls, name, None) or nn.Module.forward)
    if name in seen or function is nn.Module.forward or not inspect.isfunction(function):
        return
    seen.add(name)
    tree = _parsed(function)
    if tree is not None and tree.args.args:
        yield from _of_block(cls, tree.args.args[0].arg, tree.body, seen)


def _of_block(cls: type[nn.Module], me: str, body: list[ast.stmt], seen: set[str]) -> Iterator[str]:
    """What these statements read whenever they run, up to the first that may leave the function."""
    for statement in body:
        if isinstance(statement, (ast.With, ast.AsyncWith)):
            for item in statement.items:
                yield from _of_expression(cls, me, item.context_expr, seen)
            yield from _of_block(cls, me, statement.body, seen)
        elif isinstance(statement, (ast.If, ast.While)):
            yield from _of_expression(cls, me, statement.test, seen)
        elif isinstance(statement, (ast.For, ast.AsyncFor)):
            yield from _of_expression(cls, me, statement.iter, seen)
        elif isinstance(statement, _PLAIN) and statement.value is not None:
            yield from _of_expression(cls, me, statement.value, seen)
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and _returns(statement):
            return


def _returns(statement: ast.stmt) -> bool:
    return any(isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) for node in ast.walk(statement))


def _of_expression(cls: type[nn.Module], me: str, node: ast.expr, seen: set[str]) -> Iterator[str]:
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.JoinedStr)):
        return
    if isinstance(node, ast.IfExp):
        yield from _of_expression(cls, me, node.test, seen)
        return
    if isinstance(node, ast.BoolOp):
        yield from _of_expression(cls, me, node.values[0], seen)
        return
    if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops):
        return
    if isinstance(node, ast.Attribute):
        chain = _chain(node, me)
        if chain is not None and len(chain) > 1 and _METADATA.isdisjoint(chain):
            yield ".".join(chain)
        if chain is None and node.attr not in _METADATA:
            yield from _of_expression(cls, me, node.value, seen)
        return
    if isinstance(node, ast.Call):
        chain = _chain(node.func, me)
        if chain is not None and len(chain) == 1:
            yield from _of_method(cls, chain[0], seen)
        elif chain is not None and _METADATA.isdisjoint(chain) and len(chain) > 2:
            yield ".".join(chain[:-1])  # self.q.weight.t()
        elif chain is None and not (isinstance(node.func, ast.Attribute) and node.func.attr in _METADATA):
            yield from _of_expression(cls, me, node.func, seen)
        if _called(node.func) in _LOOKS:
            return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) and not (isinstance(node, ast.Call) and child is node.func):
            yield from _of_expression(cls, me, child, seen)
        elif isinstance(child, ast.keyword):
            yield from _of_expression(cls, me, child.value, seen)


def _chain(node: Any, me: str) -> list[str] | None:
    """`self.a.b` -> [a, b]; None for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return parts[::-1] if isinstance(node, ast.Name) and node.id == me and parts else None


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def rebind_forwards(model: nn.Module, owners: Iterable[nn.Module]) -> None:
    """`self.call = self.q.forward`, bound before grafting, runs the class of then: let it run that of the call."""
    known = {id(owner): owner for owner in owners}
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            owner = known.get(id(getattr(value, "__self__", None))) if inspect.ismethod(value) else None
            if owner is not None and value.__func__ is base_class(owner).forward and name != HOOKED:
                module.__dict__[name] = functools.partial(_forward, owner)


def _forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return owner.forward(*args, **kwargs)


def reader_of(modules: Mapping[str, nn.Module], owner: str, attribute: str, maybe: bool = False) -> str | None:
    """The path of the module above an owner that reads this parameter of it in every forward; None if none does.

    `maybe` is content with a read anywhere in the module's methods.
    """
    parts = owner.split(".") if owner else []
    for depth in range(len(parts) - 1, -1, -1):
        path, within = ".".join(parts[:depth]), ".".join(parts[depth:])
        parent = modules.get(path)
        if parent is None:
            continue
        cls: Any = base_class(parent)
        for read in _anywhere(cls, attribute) if maybe else reads(cls, attribute):
            if read == f"{within}.{attribute}" or read.startswith(f"{within}.{attribute}."):
                return path
    return None
