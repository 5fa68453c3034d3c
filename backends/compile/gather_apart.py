"""GatherApart: on a CPU, the factors of all sites are gathered by one operator instead of by generated code.

    all_factors(theta, counts, [ia, ib, ja, jb, ...])   ->   gathered_factors(theta, counts, [ia, ib, ja, jb, ...])

Inductor writes a loop for every gather and for every gradient, and the C++ compiler takes longer over these than over
the rest of the model; what they compute is what `index_select` and `index_add` do anyway. Part of `fg.compile` only: a
package must not need an operator of ours. Does not handle vectors and indices on several devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...passes.graph.products import value
from ...passes.methods.unilora.gather import all_factors, gather
from ...rewriter.dialect import reads
from ...rewriter.program import Pass, PassResult, Program, replace_meta
from ...rewriter.sites import NoMatch

_library = torch.library.Library("fxgraft_kernels", "FRAGMENT")
_library.define("gather_all(Tensor scaled, Tensor[] indices) -> Tensor[]")
_library.define("sum_all(Tensor[] grads, Tensor[] indices, SymInt length) -> Tensor")


def _sum_all(grads: list[Tensor], indices: list[Tensor], length: int) -> Tensor:
    total = grads[0].new_zeros(length)
    for grad, index in zip(grads, indices, strict=True):
        total.index_add_(0, index.flatten(), grad.flatten())
    return total


_library.impl("gather_all", gather, "CPU")
_library.impl("sum_all", _sum_all, "CPU")


@torch.library.register_fake("fxgraft_kernels::gather_all", lib=_library)
def _(scaled: Tensor, indices: list[Tensor]) -> list[Tensor]:
    return [scaled.new_empty(index.shape) for index in indices]


@torch.library.register_fake("fxgraft_kernels::sum_all", lib=_library)
def _(grads: list[Tensor], indices: list[Tensor], length: int) -> Tensor:
    return grads[0].new_empty(length)


@reads(fresh=True)
def gathered_factors(theta: Tensor, counts: Tensor, indices: list[Tensor]) -> tuple[Tensor, ...]:
    """`all_factors`: theta and counts `(d,)`, indices int32 of any shapes -> the factors, in the indices' shapes."""
    kernels = torch.ops.fxgraft_kernels
    return all_factors(theta, counts, indices, kernels.gather_all.default, kernels.sum_all.default)


@dataclass(frozen=True)
class GatherApart(Pass):
    """See the module's A -> B lines. Works in place."""

    def run(self, program: Program) -> PassResult:
        count, no_matches = 0, []
        for node in program.graph.nodes:
            if node.op != "call_function" or node.target is not all_factors:
                continue
            theta, counts, indices = node.args
            devices = {None if (t := value(n)) is None else t.device.type for n in (theta, counts, *indices)}
            if devices != {"cpu"}:
                no_matches.append(NoMatch("its tensors are not all on a CPU", node.name))
                continue
            node.target = gathered_factors
            replace_meta(node, node, type(self).__name__, f"{len(indices)} factors, one call")
            count += 1
        return PassResult(program, count > 0, count, tuple(no_matches))
