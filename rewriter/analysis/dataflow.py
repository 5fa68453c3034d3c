"""Graph questions, asked of networkx: who shares a tensor, who reads the same input, may nodes be fused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import networkx as nx
import torch
from torch import Tensor, fx, nn

from ..base_names import base_parameters
from ..sites import NoMatch


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors over the same memory. Tensors without memory (meta) are told apart by identity."""
    if tensor.device.type == "meta" or type(tensor.data) is not torch.Tensor:
        return ("id", id(tensor))
    return (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))


def sharing(model: nn.Module) -> nx.Graph:
    """Bipartite graph of parameter names (`kind="name"`) and the memory they live in (`kind="tensor"`)."""
    graph = nx.Graph()
    for name, parameter in base_parameters(model):
        key = storage_key(parameter)
        graph.add_node(name, kind="name")
        graph.add_node(key, kind="tensor")
        graph.add_edge(name, key)
    return graph


def tied_names(model: nn.Module) -> dict[str, frozenset[str]]:
    """For each parameter name that shares its memory: all names of that memory, its own included."""
    graph = sharing(model)
    result = {}
    for component in nx.connected_components(graph):
        names = frozenset(n for n in component if graph.nodes[n]["kind"] == "name")
        if len(names) > 1:
            result.update(dict.fromkeys(names, names))
    return result


def dependencies(graph: fx.Graph) -> nx.DiGraph:
    """The def-use graph: an edge from every node to each of its users."""
    result = nx.DiGraph()
    result.add_nodes_from(graph.nodes)
    result.add_edges_from((node, user) for node in graph.nodes for user in node.users)
    return result


def siblings(graph: fx.Graph, reads: Callable[[fx.Node], fx.Node | None]) -> list[list[fx.Node]]:
    """Groups of two or more nodes that read the same input, in graph order.

    Args:
        reads: the input a node counts by, or None for nodes that do not take part.
    """
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if (source := reads(node)) is not None:
            groups[source].append(node)
    return [group for group in groups.values() if len(group) > 1]


def can_fuse(flow: nx.DiGraph, nodes: Iterable[fx.Node]) -> NoMatch | None:
    """None if the nodes may become one node; otherwise why not: one of them depends on another."""
    nodes = list(nodes)
    for node in nodes:
        reached = nx.descendants(flow, node)
        for other in nodes:
            if other in reached:
                return NoMatch(f"{other.name} depends on {node.name}", node.name)
    return None
