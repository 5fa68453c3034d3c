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
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..adapter_tensors import Container
from ..analysis.memory import erase_unread
from ..base_names import in_order
from ..calls.disabled import is_off
from ..errors import CaptureError
from ..grafted_class import BASE, Grafted, plain_view, renew_class
from ..products.find import find_products
from ..products.linear import Linear, is_linear_call
from ..products.product import ProductNode
from ..sites import NoMatch
from ..state import STATE
from .own_names import own_names
from .skeleton import copy_skeleton


class OutlinedLinear(nn.Module):
    """`x W^T (+ b)` cut out of a graph. Its tensors keep the layout and the names they had there."""

    def __init__(self, weight: str, bias: str, contracted: int) -> None:
        super().__init__()
        self.weight_name, self.bias_name, self.contracted = weight, bias, contracted

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self, self.weight_name)
        bias = getattr(self, self.bias_name)
        return F.linear(x, weight if self.contracted == 1 else weight.t(), bias)


class AdaptableGraphModule(fx.GraphModule):
    """A GraphModule that keeps what its graph does not name when it is copied or pickled: fx would drop the adapters'
    record, the tensors that sites share, and the class of a root that owns a site itself."""

    def _unnamed(self) -> dict[str, Any]:
        names = [n for n in self.__dict__ if n == STATE or (n.startswith("fxgraft") and not n.startswith(BASE))]
        return {
            "attributes": {n: self.__dict__[n] for n in names},
            "modules": {n: m for n, m in self._modules.items() if isinstance(m, Container)},
            "owner": BASE in self.__dict__,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        plain = plain_view(self)
        memo.setdefault(id(memo), []).append(plain)  # the memo is keyed by id: what it names must stay alive
        with warnings.catch_warnings():  # torch copies its own pytree specs in a deprecated way
            warnings.simplefilter("ignore", FutureWarning)
            twin = fx.GraphModule.__deepcopy__(plain, memo)  # type: ignore[arg-type]
        memo[id(self)] = twin
        _as_in(twin, self)
        return _attach(twin, copy.deepcopy(self._unnamed(), memo))

    def __reduce__(self) -> Any:
        rebuild, arguments = fx.GraphModule.__reduce__(plain_view(self))  # type: ignore[arg-type]
        return (_rebuild, (rebuild, arguments, self._unnamed()))

    @property
    def graph(self) -> fx.Graph:
        """What the module computes now: exporters run the graph, and not the forward."""
        grafted = type(self).fxgraft_graph if isinstance(self, Grafted) else None
        return self._graph if grafted is None or is_off(self) else grafted

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]

    def recompile(self) -> Any:
        if BASE in self.__dict__:
            raise CaptureError(
                "the root of this graph owns an adapted weight, and a new forward would be without the adapter: change "
                "the graph before rewrite, or fg.merge it first"
            )
        return super().recompile()


def _as_in(twin: nn.Module, gm: nn.Module) -> None:
    """fx copies tensors in the order that the graph reads them in, and every buffer as a persistent one: undo that."""
    in_order(twin, gm.state_dict(keep_vars=True))
    modules = dict(twin.named_modules())
    for path, module in gm.named_modules():
        if (copied := modules.get(path)) is not None:  # a lifted constant is a plain attribute of the original
            added = copied._buffers.keys() - module._buffers.keys()
            copied._non_persistent_buffers_set |= added | (module._non_persistent_buffers_set & copied._buffers.keys())


def _attach(gm: fx.GraphModule, unnamed: dict[str, Any]) -> fx.GraphModule:
    gm.__dict__.update(unnamed["attributes"])
    gm._modules.update(unnamed["modules"])
    if unnamed["owner"]:
        gm.__dict__[BASE] = type(gm)
        renew_class(gm)
    return gm


def _rebuild(rebuild: Any, arguments: Any, unnamed: dict[str, Any]) -> fx.GraphModule:
    gm = rebuild(*arguments)
    return _attach(AdaptableGraphModule(gm, gm.graph), unnamed)


def _owner_path(linear: ProductNode) -> str | None:
    """The module path of a weight with a bias (if any) of the same module."""
    path, _, _ = linear.weight_name.rpartition(".")
    if not path:
        return None
    if linear.form != "matmul" and linear.bias_name is not None and linear.bias_name.rpartition(".")[0] != path:
        return None
    return path


def outline_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy (tensors shared) in which every linear product that can be is a submodule."""
    if isinstance(gm, AdaptableGraphModule):
        return gm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        result = copy_skeleton(gm)
    _as_in(result, gm)
    own_names(result)
    parameters = dict(result.named_parameters(remove_duplicate=False))
    found = find_products(result.graph, parameters)
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
        if not isinstance(first.product, Linear) or not all(map(is_linear_call, (one.node for one in linears))):
            continue
        weight = first.weight_name.rpartition(".")[2]
        bias = None  # `x @ W + b` keeps its own sum
        if first.form != "matmul" and first.bias_name is not None:
            bias = first.bias_name.rpartition(".")[2]
        held = {n for n, tensor in {**holder._parameters, **holder._buffers}.items() if tensor is not None}
        if held != {weight} | ({bias} - {None}) or holder._modules or type(holder) is OutlinedLinear:
            continue
        parent, _, leaf = path.rpartition(".")
        layer = OutlinedLinear(weight, bias or "bias", first.product.contracted)
        for name in holder._parameters:  # in the order of the keys
            layer.register_parameter(name, holder._parameters[name])
        layer.register_parameter(bias or "bias", layer._parameters.get(bias or "bias"))
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
    _as_in(adaptable, result)
    adaptable.train(gm.training)
    return adaptable


def inline_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """The inverse of `outline_linears` on a graph without adapters, in place: plain attributes and operators again."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and type(gm.get_submodule(n.target)) is OutlinedLinear]
    for path in dict.fromkeys(str(node.target) for node in calls):
        layer = cast(OutlinedLinear, gm.get_submodule(path))
        holder = nn.Module()
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                holder.register_parameter(name, parameter)
        holder.train(layer.training)
        for node in (node for node in calls if node.target == path):
            with gm.graph.inserting_before(node):
                weight = gm.graph.get_attr(f"{path}.{layer.weight_name}")
                given = layer._parameters.get(layer.bias_name) is not None
                added = gm.graph.get_attr(f"{path}.{layer.bias_name}") if given else None
                turned = weight if layer.contracted == 1 else gm.graph.call_method("t", (weight,))
                product = gm.graph.call_function(F.linear, (node.args[0], turned, added))
            product.meta.update(node.meta)
            node.replace_all_uses_with(product)
            gm.graph.erase_node(node)
        parent, _, leaf = path.rpartition(".")
        setattr(gm.get_submodule(parent), leaf, holder)
    plain = fx.GraphModule(gm, gm.graph)
    _as_in(plain, gm)
    plain.meta.update(gm.meta)
    plain.__dict__["training"] = gm.training
    return plain
