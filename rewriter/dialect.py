"""How a method declares its operator in the `fxgraft` dialect.

An operator is registered as CompositeImplicitAutograd with its plain PyTorch definition. Eager calls and autograd go
through the definition; Dynamo and `torch.export` keep the call as one node, which passes match and rewrite; whatever
knows nothing of the dialect decomposes the node into plain ATen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def is_dialect(target: Any) -> bool:
    """Whether the target of an fx node is an operator of the dialect."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE
