"""A whole graph whose weights are plain attributes -> the same graph with its linear products as submodules.

    linear(x, get_attr[a.b.weight], get_attr[a.b.bias])  ->  call_module[a.b](x)
    addmm / matmul with get_attr[a.b.weight]             ->  call_module[a.b](x)

After that a GraphModule is adapted like any module: one way of grafting for every form of a model. State-dict keys do
not change. Does not handle a weight that is read by something that is no product (a tied embedding): it stays a plain
attribute, and a target that names it is an error that says so.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .memory import erase_unread
from .sites import LinearNode, NoMatch, find_linears
from .skeleton import copy_skeleton
from .state import STATE, Container


class OutlinedLinear(nn.Module):
    """`x W^T (+ b)` cut out of a graph. `weight` and `bias` keep the layout and the names they had there."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, contracted: int) -> None:
        super().__init__()
        self.contracted = contracted
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.contracted == 1 else self.weight.t(), self.bias)


class AdaptableGraphModule(fx.GraphModule):
    """A GraphModule that keeps what its graph does not name when it is copied or pickled: fx would drop the adapters'
    record and the tensors that sites share."""

    def _unnamed(self) -> dict[str, Any]:
        record = {STATE: self.__dict__[STATE]} if STATE in self.__dict__ else {}
        return {"attributes": record, "modules": {n: m for n, m in self._modules.items() if isinstance(m, Container)}}

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        with warnings.catch_warnings():  # torch copies its own pytree specs in a deprecated way
            warnings.simplefilter("ignore", FutureWarning)
            twin = super().__deepcopy__(memo)
        return _attach(twin, copy.deepcopy(self._unnamed(), memo))

    def __reduce__(self) -> Any:
        rebuild, arguments = super().__reduce__()
        return (_rebuild, (rebuild, arguments, self._unnamed()))


def _attach(gm: fx.GraphModule, unnamed: dict[str, Any]) -> fx.GraphModule:
    gm.__dict__.update(unnamed["attributes"])
    gm._modules.update(unnamed["modules"])
    return gm


def _rebuild(rebuild: Any, arguments: Any, unnamed: dict[str, Any]) -> fx.GraphModule:
    gm = rebuild(*arguments)
    return _attach(AdaptableGraphModule(gm, gm.graph), unnamed)


def _owner_path(linear: LinearNode) -> str | None:
    """The module path of a weight called `<path>.weight` with a bias (if any) called `<path>.bias`."""
    path, _, leaf = linear.weight_name.rpartition(".")
    if not path or leaf != "weight":
        return None
    if linear.form != "matmul" and linear.bias_name not in (None, f"{path}.bias"):
        return None
    return path


def outline_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy (tensors shared) in which every linear product that can be is a submodule."""
    if isinstance(gm, AdaptableGraphModule):
        return gm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        result = copy_skeleton(gm)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    found = find_linears(result.graph, parameters)
    outlined: dict[fx.Node, fx.Node] = {}
    orphans: list[fx.Node] = []
    for linears in found.values():
        if isinstance(linears, NoMatch):
            continue
        path = _owner_path(linears[0])
        if path is None or any(_owner_path(other) != path for other in linears):
            continue
        holder = result.get_submodule(path)
        first = linears[0]
        fused_bias = None if first.form == "matmul" else first.bias_name  # `x @ W + b` keeps its own sum
        if {n for n, p in holder._parameters.items() if p is not None} - {"weight", "bias"} or holder._modules:
            continue
        parent, _, leaf = path.rpartition(".")
        old_bias = holder._parameters.get("bias")
        layer = OutlinedLinear(parameters[first.weight_name], parameters[fused_bias] if fused_bias else None,
                               first.contracted)  # fmt: skip
        if fused_bias is None and old_bias is not None:
            continue
        layer.train(holder.training)
        setattr(result.get_submodule(parent), leaf, layer)
        for linear in linears:
            with result.graph.inserting_before(linear.node):
                call = result.graph.call_module(path, (outlined.get(linear.x, linear.x),))
            call.meta.update(linear.node.meta)
            linear.node.replace_all_uses_with(call)
            orphans += linear.node.all_input_nodes
            result.graph.erase_node(linear.node)
            outlined[linear.node] = call
    if outlined:
        erase_unread(result.graph, orphans)  # the reads of the outlined weights
        result.graph.lint()
    adaptable = AdaptableGraphModule(result, result.graph)
    adaptable.train(gm.training)
    return adaptable
