"""LowerShared: what `Share` makes of several nodes gets a kernel on the way back.

    all_factors(theta, ...)   ->   summed_factors(theta, ...)      in training: one sum of the same bits every run

It runs behind `Share`. Does not handle inputs that are not float32, float16 or bfloat16 on the kernels' device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...passes.graph.products import value
from ...rewriter.program import Pass, PassResult, Program, replace_meta
from ...rewriter.sites import NoMatch
from .optional_triton import DEVICES, DTYPES

#: what `Share` puts into a graph -> the same with a kernel inside; kernel files add theirs
shared: dict[Callable[..., Any], Callable[..., Any]] = {}


@dataclass(frozen=True)
class LowerShared(Pass):
    """See the module's A -> B lines. Works in place.

    Args:
        devices: of inputs that are lowered.
    """

    devices: tuple[str, ...] = DEVICES

    def run(self, program: Program) -> PassResult:
        count, no_matches = 0, []
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target not in shared:
                continue
            first = value(node.args[0])
            if not program.training:
                no_matches.append(NoMatch("its kernel is for the way back, and nothing trains", node.name))
            elif first is None or first.device.type not in self.devices or first.dtype not in DTYPES:
                no_matches.append(NoMatch("its tensors are not the kernels'", node.name))
            else:
                node.target = shared[node.target]
                replace_meta(node, node, type(self).__name__, "the same bits every run")
                count += 1
        return PassResult(program, count > 0, count, tuple(no_matches))
