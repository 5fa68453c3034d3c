"""What stands last on the way to a model's output, told from traced graphs: the module's own, and its children's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from ..capture.trace import trace
from ..errors import CaptureError
from ..grafted_class import plain_view


def _graph_of(module: nn.Module) -> fx.Graph | None:
    try:
        return trace(plain_view(module)).graph
    except CaptureError:
        return None


def _computes(module: nn.Module | None) -> bool:
    """Whether a module multiplies with weights: norms and activations only shape what comes before them."""
    return module is not None and any(p.dim() > 1 for p in module.parameters())


def last_products(modules: Mapping[str, nn.Module], path: str = "") -> set[str]:
    """Paths of the layers whose products reach the output of a module with no other product after them.

    Empty where torch.fx cannot follow the module, or one inside it on the way.
    """
    module = modules[path]
    if not any(_computes(child) for child in module.children()):
        return {path} if _computes(module) else set()
    graph = _graph_of(module)
    if graph is None:
        return set()
    found: set[str] = set()
    seen: set[fx.Node] = set()
    pending = [node for end in graph.nodes if end.op == "output" for node in end.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        inner = ".".join(filter(None, (path, str(node.target)))) if node.op == "call_module" else ""
        if inner and _computes(modules.get(inner)):
            found |= last_products(modules, inner)
        else:
            pending += node.all_input_nodes
    return found


def feeds_products(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether another product of the model reads what a module gives, in a graph of one of the modules around it."""
    while path:
        above, _, _ = path.rpartition(".")
        parent = modules.get(above)
        graph = None if parent is None else _graph_of(parent)
        if graph is None:
            return False
        name = path[len(above) + 1 if above else 0 :]
        pending = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
        seen: set[fx.Node] = set()
        while pending:
            for user in pending.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                inner = ".".join(filter(None, (above, str(user.target)))) if user.op == "call_module" else ""
                if inner and inner != path and _computes(modules.get(inner)):
                    return True
                pending.append(user)
        path = above
    return False
