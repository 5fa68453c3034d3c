"""How a method declares its operator in the `fxgraft` dialect, and what the compiler may know of it: its traits.

An operator is registered as CompositeImplicitAutograd with its plain PyTorch definition. Eager calls and autograd go
through the definition; Dynamo and `torch.export` keep the call as one node, which passes match and rewrite; whatever
knows nothing of the dialect decomposes the node into plain ATen. Passes learn from an operator's traits what to do with
it: none knows its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

NAMESPACE = "fxgraft"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # keeps the registrations alive

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Halves:
    """How a low-rank operator splits: from the input down to a few numbers, and from these up to the delta.

        op(x, *tensors)  ==  up(F.linear(x, down(*tensors)), *tensors)

    Passes share, join or move the products. The functions take the operator's arguments behind its inputs.

    Args:
        down: -> `(q, in)`; the products of the whole group can be one.
        up: `(z (..., q), *arguments) -> (..., out)`, in z's dtype; `product_with(across)` where nothing is cheaper.
        across: -> `(out, q)` with `up(z) = z across^T`; None where the up half is more than a product.
        inputs: how many leading arguments are the input; they must be one and the same node (a dropped copy is not).
        reads: which arguments behind the inputs `down` reads; None: all. Nodes that share those go down as one.
    """

    down: Callable[..., Tensor]
    up: Callable[..., Tensor]
    across: Callable[..., Tensor] | None = None
    inputs: int = 1
    reads: tuple[int, ...] | None = None


def product_with(across: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The up half that multiplies by a factor: `across` as in `Halves`."""

    def up(z: Tensor, *arguments: Any) -> Tensor:
        return F.linear(z, cast(across(*arguments), z))

    up.__name__ = across.__name__.replace("across", "up")
    return up


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


@dataclass(frozen=True)
class Traits:
    """What is known of a target of ours: an operator of the dialect, or a Python function that stands in graphs.

    Args:
        halves: how a low-rank operator splits.
        common: what its nodes can compute at once.
        weight_form: of an operator that is a linear map of x for fixed tensors, `(*arguments behind x and the
            product) -> weight, bias`.
        fresh: it only reads, and its result never lies in the memory of what it is given.
        factor: it only reads and makes a factor, which may be a view: two calls with the same tensors are one.
        direct: what runs in eager instead of the operator.
    """

    halves: Halves | None = None
    common: Common | None = None
    weight_form: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    fresh: bool = False
    factor: bool = False
    direct: Callable[..., Tensor] | None = None


_NONE = Traits()
_declared: dict[Any, Traits] = {}


def traits_of(target: Any) -> Traits:
    """What was declared of the target of an fx node; the empty record where nothing was."""
    return _declared.get(target, _NONE)


def operator(schema: str, traits: Traits = _NONE) -> Callable[[Callable[..., Tensor]], torch._ops.OpOverload]:
    """Register the decorated function as `fxgraft::<schema>` and return the operator overload.

    Args:
        schema: an ATen function schema without namespace, e.g. `"lora(Tensor x, Tensor A) -> Tensor"`.
        traits: what passes may know of it; the functions it names need no declaration of their own.
    """

    def register(definition: Callable[..., Tensor]) -> torch._ops.OpOverload:
        name = schema.split("(", 1)[0].strip()
        _library.define(schema)
        _library.impl(name, definition, "CompositeImplicitAutograd")
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        _declared[overload] = replace(traits, fresh=True, direct=_call_directly(overload, definition))
        if (halves := traits.halves) is not None:
            _declare_halves(halves)
        if traits.common is not None:
            reads(fresh=True)(traits.common.function)
        return overload

    return register


_split: dict[Any, Halves] = {}


def splits(halves: Halves) -> Callable[[Function], Function]:
    """Declare the halves of a plain function that a method emits; passes, which see operators, do not ask for them."""

    def declare(function: Function) -> Function:
        _split[function] = halves
        return function

    return declare


def halves_of(target: Any) -> Halves | None:
    """How what a method emits splits: an operator of the dialect, or a plain function."""
    return _split.get(target) or traits_of(target).halves


_chains: set[Any] = set()


def chain(function: Function) -> Function:
    """Declare that the decorated function, which a method emits, multiplies its input by its tensors `(..., in, q)` one
    after the other."""
    _chains.add(function)
    return function


def is_chain(target: Any) -> bool:
    return target in _chains


def reads(*, fresh: bool = False, factor: bool = False) -> Callable[[Function], Function]:
    """Declare that the decorated function, which passes put into graphs, only reads; flags as in `Traits`."""

    def declare(function: Function) -> Function:
        _declared[function] = Traits(fresh=fresh, factor=factor)
        return function

    return declare


def _declare_halves(halves: Halves) -> None:
    reads(fresh=True)(halves.up)
    for function in (halves.down, halves.across):
        if function is not None:
            reads(factor=True)(function)


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
        if is_dialect(node.target) and (direct := traits_of(node.target).direct) is not None:
            node.target = direct
    return result


def cast(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the dtype of `like`: the check is cheaper than a conversion that does nothing."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def is_dialect(target: Any) -> bool:
    """Whether the target of an fx node is an operator of the dialect."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
