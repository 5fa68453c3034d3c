"""How a method declares its operator in the `fxgraft` dialect.

An operator is registered as CompositeImplicitAutograd with its plain PyTorch definition. Eager calls and autograd go
through the definition; Dynamo and `torch.export` keep the call as one node, which passes match and rewrite; whatever
knows nothing of the dialect decomposes the node into plain ATen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

NAMESPACE = "fxgraft"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # keeps the registrations alive


def operator(schema: str) -> Callable[[Callable[..., Tensor]], torch._ops.OpOverload]:
    """Register the decorated function as `fxgraft::<schema>` and return the operator overload.

    Args:
        schema: an ATen function schema without namespace, e.g. `"lora(Tensor x, Tensor A) -> Tensor"`.
    """

    def register(definition: Callable[..., Tensor]) -> torch._ops.OpOverload:
        name = schema.split("(", 1)[0].strip()
        _library.define(schema)
        _library.impl(name, definition, "CompositeImplicitAutograd")
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        _direct[overload] = _call_directly(overload, definition)
        return overload

    return register


_direct: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}


def _call_directly(overload: torch._ops.OpOverload, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        return overload(*args) if torch.compiler.is_compiling() else definition(*args)

    call.__name__ = f"{definition.__name__}_direct"
    return call


def eager_form(graph: fx.Graph) -> fx.Graph:
    """A copy to run as Python: operators of the dialect call their definition unless a compiler or exporter is looking.

    The detour through the dispatcher into Python costs some 20 us per site, a tenth of a small layer.
    """
    result = fx.Graph()
    result.output(result.graph_copy(graph, {}))
    result.set_codegen(graph._codegen)
    for node in result.nodes:
        if is_dialect(node.target):
            node.target = _direct[node.target]  # type: ignore[index]
    return result


@dataclass(frozen=True)
class Common:
    """What the nodes of one operator can compute at once.

    Args:
        shared: how many arguments behind the input are the same for all nodes.
        function: `(*shared arguments, [the other arguments of all nodes])` -> as many tensors, in order.
        replacement: the operator that takes the input and a node's part of the result.
    """

    shared: int
    function: Callable[..., tuple[Tensor, ...]]
    replacement: torch._ops.OpOverload


common: dict[torch._ops.OpOverload, Common] = {}


def register_common(
    operator: torch._ops.OpOverload,
    shared: int,
    function: Callable[..., tuple[Tensor, ...]],
    replacement: torch._ops.OpOverload,
) -> None:
    """Say what an operator's nodes can compute at once."""
    common[operator] = Common(shared, function, replacement)


#: operators that are a linear map of x for fixed tensors: `(*arguments behind x and the product) -> weight, bias`
weight_form: dict[torch._ops.OpOverload, Callable[..., tuple[Tensor, Tensor | None]]] = {}


def cast(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the dtype of `like`: the check is cheaper than a conversion that does nothing."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def is_dialect(target: Any) -> bool:
    """Whether the target of an fx node is an operator of the dialect."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
