"""Accumulate: the base's product adds itself onto the delta, so that the sum costs no pass over the output.

    linear(x, W, b) + op(x, *a)       ->   onto(bias + z across^T, x, W)       z = x down^T
    linear(x, W, b) + up(z, *a)       ->   the same, behind `Siblings`

Inside, `bias + z across^T` is a product with the bias as its start, and `x W^T` runs with beta 1 into that buffer. The
backward does the same the other way: the gradient of x through the base is the only new tensor of x's size.
Does not handle up halves that are more than a product (HydraLoRA), sums that anything else reads, products with a
weight that is no plain matrix (quantised), operands that are written in between, and numbers that autocast rounds. In
less than float32 the sum stays a step of its own: what the adapter changed is then what it changes without compiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.amp.autocast_mode import _enter_autocast

from ...rewriter.analysis.memory import Memory
from ...rewriter.dialect import Halves, cast, is_dialect, reads
from ...rewriter.program import Pass, PassResult, Program, put
from ...rewriter.sites import NoMatch
from .cost import accumulate_pays
from .products import Product, autocast, one_product, rows, split, summed, value
from .siblings import HALVES, go_down

_library = torch.library.Library("fxgraft_kernels", "FRAGMENT")
_library.define("onto_(Tensor(a!) y, Tensor x, Tensor weight) -> ()")


def _onto(y: Tensor, x: Tensor, weight: Tensor) -> None:
    torch.addmm(y, x, weight, out=y)


for _key in ("CPU", "CUDA"):
    _library.impl("onto_", _onto, _key)


@torch.library.register_fake("fxgraft_kernels::onto_", lib=_library)
def _(y: Tensor, x: Tensor, weight: Tensor) -> None:
    return None


class _Onto(torch.autograd.Function):
    """`bias + z across^T + x W^T`. x `(n, in)`, weight `(in, out)` (a view), z `(n, q)`, across `(out, q)`."""

    @staticmethod
    def forward(ctx, x, weight, bias, z, across):  # type: ignore[no-untyped-def, override]
        need_x, need_weight, _, need_z, need_across = ctx.needs_input_grad
        # only what a gradient reads: the program may write into the rest
        ctx.save_for_backward(
            x if need_weight else None,
            weight if need_x else None,
            z if need_across else None,
            across if need_z else None,
        )
        y = z @ across.t() if bias is None else torch.addmm(bias, z, across.t())
        torch.ops.fxgraft_kernels.onto_(y, x, weight)
        return y

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def, override]
        x, weight, z, across = ctx.saved_tensors
        need_x, need_weight, need_bias, need_z, need_across = ctx.needs_input_grad
        return (
            g @ weight.t() if need_x else None,
            x.t() @ g if need_weight else None,
            g.sum(0) if need_bias else None,
            g @ across if need_z else None,
            (z.t() @ g).t() if need_across else None,  # the layout whose product is fast on CPU
        )


@reads(fresh=True)
def onto(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, across: Tensor, transposed: bool) -> Tensor:
    """`x W^T + bias + z across^T`: x `(..., in)`; weight `(out, in)`, or `(in, out)` if transposed; z `(..., q)`;
    across `(out, q)` -> `(..., out)`."""
    matrix = weight if transposed else weight.t()
    y = _Onto.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), matrix, bias, z.reshape(-1, z.shape[-1]), cast(across, z)
    )
    return y.view(*x.shape[:-1], matrix.shape[1])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Accumulate(Pass):
    """See the module's A -> B lines. Works in place.

    Args:
        always: leave the cost rule out.
    """

    always: bool = False

    def run(self, program: Program) -> PassResult:
        count, no_matches = 0, []
        memory = Memory(program.graph)
        if program.training and (autocast() or any(n.target is _enter_autocast for n in program.graph.nodes)):
            return PassResult(program, False, 0, (NoMatch("training under autocast: the way back has casts too"),))
        for node in list(program.graph.nodes):
            found = summed(node)
            if isinstance(found, NoMatch):
                continue
            base, delta = found
            if memory.transformed(node):
                no_matches.append(NoMatch("its operator has no rule for vmap", node.name))
                continue
            parts = _up_half(delta)
            if parts is None:
                continue
            reason = self._rewrite(program.graph, memory, node, base, delta, *parts)
            if reason is not None:
                no_matches.append(reason)
                continue
            count += 1
        return PassResult(program, count > 0, count, tuple(no_matches))

    def _rewrite(
        self,
        graph: fx.Graph,
        memory: Memory,
        node: fx.Node,
        base: Product,
        delta: fx.Node,
        halves: Halves,
        x_or_z: fx.Node,
        arguments: tuple[Any, ...],
    ) -> NoMatch | None:
        if halves.across is None:
            return NoMatch("its up half is more than a product", delta.name)
        if (reason := one_product(memory, node, base, delta, x_or_z, arguments)) is not None:
            return reason
        x, weight = value(base.x), value(base.weight)
        if weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize < 4:
            return NoMatch(f"a {weight.dtype} sum is rounded once, and so tells less of the delta", node.name)
        if x is not None and weight is not None and (x.dtype != weight.dtype or not weight.dtype.is_floating_point):
            return NoMatch(f"the base multiplies {x.dtype} by {weight.dtype}", node.name)
        if not self.always:
            out = 0 if weight is None else int(weight.shape[1 if base.transposed else 0])
            verdict = accumulate_pays(rows(base.x), out, "cpu" if weight is None else weight.device.type)
            if not verdict:
                return NoMatch(f"the sum stays a pass of its own: {verdict.reason}", node.name)
        with graph.inserting_before(node):
            if is_dialect(delta.target):
                down = graph.call_function(halves.down, arguments)
                z = graph.call_function(_down_alone, (x_or_z, down))  # of a dropped input, where there is dropout
            else:
                z = x_or_z
            across = graph.call_function(halves.across, arguments)
            new = graph.call_function(onto, (base.x, base.weight, base.bias, z, across, base.transposed))
        memory.stands(new, node)
        put(new, node, type(self).__name__)
        for old in (delta, base.node):
            graph.erase_node(old)
        return None


@reads(fresh=True)
def _down_alone(x: Tensor, factor: Tensor) -> Tensor:
    return go_down(x, [factor])[0]


def _up_half(delta: fx.Node) -> tuple[Halves, fx.Node, tuple[Any, ...]] | None:
    """How a delta splits, what it reads (x, or z behind `Siblings`) and its other arguments."""
    if HALVES in delta.meta:
        z: Any = delta.args[0]
        return delta.meta[HALVES], z, delta.args[1:]
    if is_dialect(delta.target):
        parts = split(delta)
        if not isinstance(parts, NoMatch):
            return parts
    return None
