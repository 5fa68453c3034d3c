"""Forwards that go another way where an argument is left out: a graph for each of the ways.

    def forward(self, x, mask=None):
        if mask is not None: ...          a trace sees a mask that is no None, and takes this way for good

`Absent` are the names of the arguments that are None on a way. One that is only handed on makes no difference.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none

from ..errors import CaptureError

Absent = frozenset[str]
_MOST = 3  # arguments that each make a difference: eight ways


def ways(
    module: nn.Module, graph: fx.Graph, traced: Callable[[Absent], fx.Graph]
) -> Iterator[tuple[Absent, fx.Graph | None]]:
    """The graphs of the calls without some arguments, where they are not that of a call with all of them.

    Args:
        graph: of a call with all arguments.
        traced: gives the graph of a call without some. Where it raises `CaptureError`, None is given out.
    """
    try:
        parameters = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return
    used = {str(node.target) for node in graph.nodes if node.op == "placeholder" and node.users}
    optional = [name for name, p in parameters.items() if p.default is None and name in used]
    found = {}
    for name in optional:
        absent = frozenset((name,))
        other = _try(traced, absent)
        if other is None or not _alike(graph, other, name):
            found[absent] = other
    if len(found) > _MOST:
        return
    yield from found.items()
    names = [name for absent in found for name in absent]
    for count in range(2, len(names) + 1):
        for together in itertools.combinations(names, count):
            yield frozenset(together), _try(traced, frozenset(together))


def _try(traced: Callable[[Absent], fx.Graph], absent: Absent) -> fx.Graph | None:
    try:
        graph = traced(absent)
    except CaptureError:
        return None
    for node in list(graph.nodes):
        if node.target is _assert_is_none:
            graph.erase_node(node)
    return graph


def _alike(one: fx.Graph, other: fx.Graph, name: str) -> bool:
    """Whether two graphs are one, but that the first hands on the argument `name` where the second has None."""
    if len(one.nodes) != len(other.nodes):
        return False
    same: dict[fx.Node, fx.Node] = {}

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node):
            if b is None:
                return a.op == "placeholder" and a.target == name
            return same.get(a) is b
        if isinstance(a, (tuple, list)) and type(a) is type(b):
            return len(a) == len(b) and all(map(equal, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
        if isinstance(a, slice) and isinstance(b, slice):
            return equal((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return type(a) is type(b) and bool(a is b or a == b)

    for a, b in zip(one.nodes, other.nodes, strict=True):
        if (a.op, a.target) != (b.op, b.target) or not (equal(a.args, b.args) and equal(a.kwargs, b.kwargs)):
            return False
        same[a] = b
    return True


def condition(absent: Absent, all_ways: list[Absent]) -> str:
    """Python that says whether a call goes this way and no other."""
    told = sorted(frozenset().union(*all_ways))
    return " and ".join(f"{name} is {'None' if name in absent else 'not None'}" for name in told)
