"""From a 2-d parameter to its sites: the product it takes part in, in the graph of its owner or of a module above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from ..capture.multihead_attention import is_attention
from ..capture.parent_reads import reader_of
from ..capture.trace import trace
from ..errors import AdapterError, CaptureError, TargetError
from ..grafted_class import base_class, plain_view
from ..modules.scripted import why_scripted
from ..parts import Cut
from ..products.expert_weights import contracted_dim, is_experts
from ..products.experts_forward import check_implementation
from ..products.find import DIMS, find_products
from ..products.opaque import opaque_product
from ..products.product import ProductNode
from ..products.stacked_experts import Experts, Stacked
from ..quantised.quantised import quantised
from ..sites import NoMatch, Site
from ..spec import Target
from .no_products import WITHOUT_PRODUCTS


@dataclass(frozen=True)
class Candidate:
    """A parameter that may turn out to be the weight of a product.

    Args:
        linear: it has the shape of a linear's: `all-linear` looks at it.
        loose: it may as well be a table of positions or a token: only its own name means it, and no glob.
    """

    name: str
    owner: str
    attribute: str
    linear: bool = True
    loose: bool = False


def candidates_of(modules: Mapping[str, nn.Module]) -> dict[str, Candidate]:
    found = {}
    for path, module in modules.items():
        if isinstance(module, WITHOUT_PRODUCTS):
            continue
        if quantised(module) is not None:
            found[path] = Candidate(path, path, "weight")
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None and (parameter.dim() in DIMS or is_experts(module, attribute)):
                name = path if attribute == "weight" else f"{path}.{attribute}".lstrip(".")
                table = isinstance(module, nn.Embedding)
                linear = not table and (parameter.dim() == 2 or is_experts(module, attribute))
                loose = not linear and not isinstance(module, _ConvNd)
                found[name] = Candidate(name, path, attribute, linear=linear, loose=loose)
    return found


#: path -> the graph of that module alone, or why it has none: a module holds several candidates
Graphs = dict[str, fx.Graph | CaptureError]


def _graph_of(modules: Mapping[str, nn.Module], path: str, graphs: Graphs) -> fx.Graph | CaptureError:
    if path not in graphs:
        try:
            graphs[path] = trace(plain_view(modules[path])).graph
        except CaptureError as error:
            graphs[path] = error
    return graphs[path]


def product_with(
    model_modules: Mapping[str, nn.Module], candidate: Candidate, graphs: Graphs
) -> ProductNode | Stacked | NoMatch:
    """The product a candidate takes part in, from the trace of its owner alone; `graphs` are those made so far."""
    owner = model_modules[candidate.owner]
    parent = model_modules.get(candidate.owner.rpartition(".")[0])
    if (scripted := why_scripted(owner)) is not None:
        return NoMatch(scripted)
    if parent is not None and is_attention(plain_view(parent)):
        reader: str | None = candidate.owner.rpartition(".")[0]
    elif candidate.owner and isinstance(owner, (nn.ParameterList, nn.ParameterDict)):
        reader = candidate.owner.rpartition(".")[0]  # containers: the module around them computes
    else:
        reader = reader_of(model_modules, candidate.owner, candidate.attribute)
    if reader is None:
        reader = _reader_by_trace(model_modules, candidate, graphs)
    if reader is not None:
        return _hosted(model_modules, candidate, reader, graphs)
    base = base_class(owner)
    if is_experts(owner, candidate.attribute):
        return _stacked(owner, candidate.attribute)
    if any(is_experts(owner, other) for other in owner._parameters):
        return NoMatch(f"{base.__name__} computes experts, whose forward no graph can hold")
    if base.forward is nn.Module.forward:
        return NoMatch(f"{base.__name__} has no forward")
    kind = quantised(plain_view(owner))
    if kind is not None and (reason := kind.refusal(owner)) is not None:
        return NoMatch(reason)
    graph = _graph_of(model_modules, candidate.owner, graphs)
    if isinstance(graph, CaptureError):
        return NoMatch(str(graph))
    if (opaque := opaque_product(graph)) is not None:
        return opaque
    parameters = {n: p for n, p in owner._parameters.items() if p is not None}
    found = find_products(graph, parameters)[candidate.attribute]
    return found if isinstance(found, NoMatch) else found[0]


def _reader_by_trace(modules: Mapping[str, nn.Module], candidate: Candidate, graphs: Graphs) -> str | None:
    """The module above that takes the weight on the way its forward goes here, and does not call the layer there."""
    reader = reader_of(modules, candidate.owner, candidate.attribute, maybe=True)
    if reader is None:
        return None
    graph = _graph_of(modules, reader, graphs)
    if isinstance(graph, CaptureError):
        return None
    within = candidate.owner[len(reader) + 1 if reader else 0 :]
    read = any(node.op == "get_attr" and node.target == f"{within}.{candidate.attribute}" for node in graph.nodes)
    called = any(node.op == "call_module" and f"{within}.".startswith(f"{node.target}.") for node in graph.nodes)
    return reader if read and not called else None


def _stacked(owner: nn.Module, attribute: str) -> Stacked | NoMatch:
    """The products with the matrices of a stack, one per expert."""
    try:
        check_implementation(owner)
    except AdapterError as error:
        return NoMatch(str(error))
    parameters = owner._parameters
    weight: Any = parameters[attribute]
    if [name for name, other in parameters.items() if other is weight and name != attribute] or weight.is_complex():
        return NoMatch(f"{attribute!r} is tied to another parameter of its module, or complex")
    dim = contracted_dim(owner, attribute)
    return dim if isinstance(dim, NoMatch) else Stacked(Experts(contracted=dim, experts=weight.shape[0]))


def _hosted(
    modules: Mapping[str, nn.Module], candidate: Candidate, reader: str, graphs: Graphs
) -> ProductNode | NoMatch:
    """The product in the graph of the module that reads the weight, where torch.fx can follow its forward."""
    host, within = modules[reader], candidate.owner[len(reader) + 1 if reader else 0 :]
    said = (
        f"{base_class(host).__name__} ({reader or 'the root'}) reads this weight without calling the layer: an adapter "
        "on it would be silently skipped"
    )
    graph = _graph_of(modules, reader, graphs)
    if isinstance(graph, CaptureError):
        return NoMatch(f"{said}, and cannot be put into the product itself: {graph}")
    if any(node.op == "call_module" and f"{within}.".startswith(f"{node.target}.") for node in graph.nodes):
        return NoMatch(f"{said} there, as the layer is called too")
    owner = modules[candidate.owner]
    tensors = {f"{within}.{name}": p for name, p in owner._parameters.items() if p is not None}
    found = find_products(graph, tensors)[f"{within}.{candidate.attribute}"]
    if isinstance(found, NoMatch):
        return NoMatch(f"{said}, and cannot be put into the product itself: {found.reason}")
    bias = found[0].bias_name
    return replace(found[0], bias_name=None if bias is None else bias.rpartition(".")[2], host=reader)


def cut_of(candidate: Candidate, produced: int, target: Target) -> Cut | None:
    """How a target with numbered parts cuts a weight that produces so many features; None for the whole of it."""
    if target.count == 1 and target.groups == 1 and isinstance(target.parts, int):
        return None
    grouped = target.groups > 1
    said = f"Target({target.pattern!r}, parts={target.parts}{f', groups={target.groups}' if grouped else ''})"
    where = f"{candidate.name!r} produces {produced} features"
    stretch, left = divmod(produced, target.groups)
    if left:
        raise TargetError(f"{said}: {where}, which {target.groups} does not divide")
    where += f", {stretch} in each of {target.groups} groups" if grouped else ""
    if isinstance(target.parts, int):
        if stretch % target.parts:
            raise TargetError(f"{said}: {where}, which {target.parts} does not divide")
        return Cut((stretch // target.parts,) * target.parts, target.groups)
    if sum(target.parts) != stretch:
        raise TargetError(f"{said}: {where}, and these parts are {sum(target.parts)} together")
    return Cut(tuple(target.parts), target.groups)


def sites_of(
    candidate: Candidate,
    linear: ProductNode | Stacked,
    weight: Tensor,
    cut: Cut | None,
    select: Sequence[int],
    device: torch.device,
) -> list[Site]:
    """The sites of a weight: of the selected parts, or of the whole where it is not cut."""
    produced, contracted = linear.product.matrix(weight).shape[-2:]
    if cut is not None and linear.product.undivided:
        raise TargetError(
            f"{candidate.name!r} cannot be taken apart ({cut}): {linear.product.undivided}; adapt all of it"
        )
    return [
        Site(
            name=candidate.name if cut is None else f"{candidate.name}[{part}]",
            owner=candidate.owner,
            weight=candidate.attribute,
            bias=linear.bias_name,
            in_features=contracted,
            out_features=produced if cut is None else cut.groups * cut.sizes[part],
            product=linear.product,
            part=part,
            cut=cut,
            dtype=weight.dtype,
            device=device,
            form=linear.form,
            host=linear.host,
        )
        for part in ((0,) if cut is None else select)
    ]
