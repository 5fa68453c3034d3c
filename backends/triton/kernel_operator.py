"""How a kernel file declares its operator: launches where a kernel can run, a plain definition elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .launch import Launch, run
from .optional_triton import runs_on

NAMESPACE = "fxgraft_kernels"


def _rows(x: Tensor) -> Tensor:
    """`(rows, features)`, features one after the other."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def kernel_operator(
    schema: str,
    definition: Callable[..., Tensor],
    launches: Callable[..., Iterable[Launch]],
    out_features: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]],
) -> CustomOpDef:
    """The operator `fxgraft_kernels::<schema>` of `(base | None, x, *others)`, with its fake and its autograd.

    Args:
        schema: an ATen function schema without namespace; base `(..., out)` and x `(..., in)` come first.
        definition: the same in plain PyTorch, of the same arguments -> `(..., out)` in x's dtype.
        launches: `(base, x, *others, y)` with rows `(rows, features)` of base, x and the y to write -> the calls.
        out_features: `(*others)` -> out.
        backward: `(g, which of (x, *others) need a gradient, x, *others)` -> their gradients.
    """

    def launch(base: Tensor | None, x: Tensor, *others: Any) -> Tensor:
        apart = any(isinstance(t, Tensor) and t.device != x.device for t in others)  # a model spread over devices
        if apart or not runs_on(x):
            return definition(base, x, *others).contiguous()  # as the kernel's
        y = x.new_empty((*x.shape[:-1], out_features(*others)))
        run(launches(None if base is None else _rows(base), _rows(x), *others, y.view(-1, y.shape[-1])))
        return y

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in inputs[1:]))
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in inputs[1:]]

    def gradients(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        given = [n if t is None else t for t, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
        need_base, *needs = ctx.needs_input_grad
        return g if need_base else None, *backward(g, needs, *given)

    name = f"{NAMESPACE}::{schema.partition('(')[0]}"
    signature = schema.removeprefix(schema.partition("(")[0])
    operator = torch.library.custom_op(
        name, launch, mutates_args=(), device_types=("cuda", "cpu"), schema=signature
    )  # fmt: skip
    operator.register_fake(lambda base, x, *others: x.new_empty((*x.shape[:-1], out_features(*others))))
    operator.register_autograd(gradients, setup_context=setup)
    return operator
