"""May a node read earlier or later than it does, and may it go? Asked of the whole graph, before anything is changed.

Nodes are put in groups that may share memory: a result goes with whatever it may be a view of, and two tensors given
from outside go together where they lie in one storage. A write changes everything in its group.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..sites import NoMatch
from .effects import Effect, attribute, effect, switches, value


class Memory:
    """Who writes what in a graph, as it was when this was made; nodes made since take others' places by `stands`."""

    def __init__(self, graph: fx.Graph) -> None:
        self._place: dict[fx.Node, int] = {}
        self._over: dict[Any, Any] = {}  # a forest: nodes of one tree may share memory
        self._effects: dict[fx.Node, Effect] = {}
        self._fixed: list[int] = []
        self._nodes = list(graph.nodes)
        outside = any(n.op == "placeholder" and not {"val", "example_value"} & n.meta.keys() for n in self._nodes)
        for place, node in enumerate(self._nodes):
            self._place[node], self._effects[node] = place, effect(node)
            if node.op in ("placeholder", "get_attr"):
                self._join(node, "outside" if outside else _storage(node))
            for other in self._effects[node].shares:
                self._join(node, other)
            if self._effects[node].fixed:
                self._fixed.append(place)
                for other in self._effects[node].writes:
                    self._join(node, other)
        self._modes = dict(zip(self._nodes, _modes(self._nodes), strict=True))
        self._writes: dict[Any, list[int]] = defaultdict(list)
        for node, what in self._effects.items():
            for root in {self._root(other) for other in what.writes}:
                self._writes[root].append(self._place[node])

    def _root(self, item: Any) -> Any:
        while (over := self._over.get(item, item)) is not item:
            self._over[item] = item = self._over.get(over, over)
        return item

    def _join(self, one: Any, other: Any) -> None:
        self._over[self._root(one)] = self._root(other)

    def stands(self, new: fx.Node, old: fx.Node) -> None:
        """Let a node that was just made count as the one whose place it takes."""
        self._place[new], self._effects[new], self._modes[new] = self._place[old], self._effects[old], self._modes[old]
        self._join(new, old)

    def changed(self, values: Iterable[Any], first: fx.Node, last: fx.Node) -> NoMatch | None:
        """Why these values may not be the same for a node at `first` as at `last`; None where they are."""
        start, end = self._place[first], self._place[last]
        if self._modes[first] != self._modes[last]:
            return NoMatch(f"{first.name} is computed in another mode (autocast, gradients, vmap)", last.name)
        at = bisect_left(self._fixed, start)
        if at < len(self._fixed) and self._fixed[at] < end:
            return NoMatch(f"{self._nodes[self._fixed[at]].name} stands in between", last.name)
        for node in values:
            if not isinstance(node, fx.Node):
                continue
            places = self._writes.get(self._root(node), [])
            at = bisect_left(places, start)
            if at < len(places) and places[at] < end:
                return NoMatch(f"{self._nodes[places[at]].name} may write {node.name} in between", last.name)
        return None

    def written(self, node: fx.Node) -> NoMatch | None:
        """The node that may write into this one's memory, anywhere in the graph."""
        places = self._writes.get(self._root(node))
        return NoMatch(f"{self._nodes[places[0]].name} may write {node.name}", node.name) if places else None

    def modes(self) -> NoMatch | None:
        """A node that switches a mode, or of which nothing is known."""
        odd = next((n for n in self._nodes if switches(n) or self._effects[n].fixed), None)
        return None if odd is None else NoMatch(f"{odd.name} may switch a mode", odd.name)

    def transformed(self, node: fx.Node) -> bool:
        """Whether a transform of `torch.func` is at work: tensors may have a dimension that is not seen."""
        return bool(self._modes[node][2])

    def pure(self, node: fx.Node) -> bool:
        """Whether the node only reads, and gives the same for the same."""
        return self._effects[node].pure

    def private(self, node: fx.Node) -> bool:
        """Whether the node's memory is new and only its one user sees it: a sum in place may then be any sum."""
        what = self._effects[node]
        if len(node.users) != 1 or node.op not in ("call_function", "call_method") or what.fixed:
            return False
        if not what.shares:
            return True
        return what.shares == what.writes and len(what.writes) == 1 and self.private(what.writes[0])


def _modes(nodes: list[fx.Node]) -> Iterator[tuple[Any, ...]]:
    """For each node: the autocasts around it, what was last said of gradients, and the transforms around it."""
    casts: list[tuple[fx.Node, Any]] = []
    gradients: Any = None
    transforms: list[fx.Node] = []
    for node in nodes:
        if switches(node):
            name = getattr(node.target, "__name__", "")
            if name == "_enter_autocast":
                casts.append((node, node.args))
            elif name == "_exit_autocast":
                casts = [cast for cast in casts if cast[0] is not node.args[0]]
            elif "increment" in name:
                transforms.append(node)
            elif "decrement" in name:
                transforms = transforms[:-1]
            else:
                gradients = node.args[0]
        yield tuple(arguments for _, arguments in casts), gradients, tuple(transforms)


def _storage(node: fx.Node) -> Any:
    """Equal for two tensors from outside the graph that lie in the same storage."""
    tensor = attribute(node) if node.op == "get_attr" else value(node)
    if not isinstance(tensor, Tensor):
        return node
    try:
        if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
            return "wrapped"
        return ("storage", tensor.untyped_storage()._cdata)
    except NotImplementedError:  # batched tensors and the like have none to look at
        return "wrapped"


def together(nodes: Iterable[fx.Node], apart: Callable[[list[fx.Node], fx.Node], Any]) -> list[list[fx.Node]]:
    """Runs of nodes, in graph order: `apart(run, node)` says what keeps a node from joining the run before it."""
    runs: list[list[fx.Node]] = []
    for node in nodes:
        if runs and not apart(runs[-1], node):
            runs[-1].append(node)
        else:
            runs.append([node])
    return runs


def erase_unread(graph: fx.Graph, candidates: Iterable[fx.Node] | None = None) -> int:
    """Remove nodes that nobody reads and that only read, and what was read by them alone; how many.

    Args:
        candidates: where to begin, None for the whole graph. Whatever may write, draw or check stays.
    """
    waiting = list(graph.nodes if candidates is None else candidates)
    count = 0
    while waiting:
        node = waiting.pop()
        if node._erased or node.users or not effect(node).pure:
            continue
        waiting += node.all_input_nodes
        graph.erase_node(node)
        count += 1
    return count
