"""Values that a program which owns its tensors can be given at once: what is constant, and what is read no more."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...rewriter.analysis.effects import attribute, effect
from ...rewriter.analysis.memory import Memory
from ...rewriter.sites import NoMatch
from ...rewriter.targeting.patterns import matches


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Values that are kept: no gradients, and no rounding by an autocast that happens to be on."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class Constants:
    """Values of the nodes that depend on nothing but tensors which stay as they are."""

    def __init__(self, module: fx.GraphModule, swappable: tuple[str, ...], memory: Memory) -> None:
        self.module, self.swappable, self.memory = module, swappable, memory
        self._known: dict[fx.Node, Tensor | NoMatch] = {}

    def all(self, arguments: tuple[Any, ...], at: fx.Node) -> list[Any] | NoMatch:
        nodes: list[fx.Node] = []
        fx.node.map_arg(arguments, nodes.append)
        for node in nodes:
            if isinstance(value := self.of(node), NoMatch):
                return NoMatch(value.reason, at.name)
        return list(fx.node.map_aggregate(arguments, lambda a: self.of(a) if isinstance(a, fx.Node) else a))  # type: ignore[arg-type]

    def of(self, node: fx.Node) -> Any:
        if node not in self._known:
            self._known[node] = self._evaluate(node)
        return self._known[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if (written := self.memory.written(node)) is not None:
            return written
        if node.op == "get_attr":
            name = str(node.target)
            if any(matches(name, pattern) for pattern in self.swappable):
                return NoMatch(f"{name} is swappable", node.name)
            return attribute(node)
        if node.op != "call_function" or not node.all_input_nodes or not effect(node).pure:
            return NoMatch(f"{node.name} is no constant", node.name)
        if (switched := self.memory.modes()) is not None:
            return switched
        arguments = self.all(node.args, node)
        if isinstance(arguments, NoMatch) or node.kwargs:
            return arguments if isinstance(arguments, NoMatch) else NoMatch("keyword arguments", node.name)
        with by_itself():
            return node.target(*arguments)  # type: ignore[operator]


def free_place(module: fx.GraphModule, stem: str) -> int:
    """The first number whose name `<stem>_<number>` no tensor has: of those made before some are gone, others read."""
    return next(place for place in itertools.count() if not hasattr(module, f"{stem}_{place}"))


def drop_unused(module: fx.GraphModule) -> None:
    """Let go of the tensors nobody reads any more."""
    read = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name in read or any(name.startswith(f"{target}.") for target in read):
            continue
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = module.get_submodule(path)
        del (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf]
    module.delete_all_unused_submodules()
