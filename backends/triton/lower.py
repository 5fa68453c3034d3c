"""Lower: dialect nodes become Triton kernels where the gate finds these faster.

    y + op(x, *tensors)   ->   kernel(y, x, ...)          where nobody else reads the delta: the sum costs no pass
    op(x, *tensors)       ->   kernel(None, x, ...)       else

It runs before `Share`, `Choose` and `Siblings`, and what it takes they no longer see: a kernel reads its tensors as
they are stored, so there is nothing left to share or to expand; joined products of siblings stay ATen's. What the gate
leaves goes through these passes as without kernels. In training the gate leaves everything whose tensors train: the
backward passes are large products that cuBLAS does well.

Does not handle operators without a kernel (GLoRA, LoRA-XS), inputs that are not float32, float16 or bfloat16 on the
kernels' device, autocast regions (the result's dtype is not the input's), and keyword arguments.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...passes.graph.cost import hint
from ...passes.graph.products import SUMS, value
from ...passes.graph.share import Share
from ...rewriter.analysis.memory import Memory
from ...rewriter.dialect import is_dialect
from ...rewriter.emitter import add_delta
from ...rewriter.errors import FxgraftError
from ...rewriter.program import Pass, PassResult, Pipeline, Program, replace_meta
from ...rewriter.sites import NoMatch
from . import kernels  # noqa: F401  (they register)
from .kernel_gate import decide
from .lower_shared import LowerShared
from .lowerings import Lowering, lowerings
from .optional_triton import DEVICES, DTYPES


@dataclass(frozen=True)
class Lower(Pass):
    """See the module's A -> B lines. Works in place.

    Args:
        always: leave the gate out, and raise where a node cannot become a kernel.
        graphed: whether the result runs in CUDA graphs, for the gate.
        devices: of inputs that are lowered.

    Raises:
        FxgraftError: with `always`, before the graph is changed: what cannot be done, and why.
    """

    always: bool = False
    graphed: bool = False
    devices: tuple[str, ...] = DEVICES

    def run(self, program: Program) -> PassResult:
        no_matches, chosen = [], []
        for node in program.graph.nodes:
            if not is_dialect(node.target):
                continue
            lowering = lowerings.get(node.target)
            if lowering is not None and lowering.idle(node.args):
                continue
            reason = self._impossible(node, lowering)
            if reason is not None and self.always:
                raise FxgraftError(
                    f"kernels='triton': {node.name} cannot run as a kernel: {reason}; choose kernels='auto', which "
                    "leaves such adapters to ATen"
                )
            if lowering is None or reason is not None:
                no_matches.append(NoMatch(str(reason), node.name))
                continue
            text, pays = ("asked for", True) if self.always else self._gate(program, node, lowering)
            if pays:
                chosen.append((node, lowering, text))
            else:
                no_matches.append(NoMatch(f"no kernel: {text}", node.name))
        memory = Memory(program.graph)
        sums = {node: _sum_of(node, memory) for node, _, _ in chosen}
        for node, lowering, text in chosen:
            self._put(program.graph, node, sums[node], lowering, text)
        return PassResult(program, bool(chosen), len(chosen), tuple(no_matches))

    def _impossible(self, node: fx.Node, lowering: Lowering | None) -> str | None:
        if lowering is None:
            return f"no kernel for {node.target}"
        if node.kwargs:
            return "it has keyword arguments"
        x, result = value(node.args[0]), value(node)
        if x is None:
            return "nothing is known of its input"
        if x.device.type not in self.devices:
            return f"its input is on {x.device.type}, kernels run on {' and '.join(self.devices)}"
        if x.dtype not in DTYPES:
            return f"its input is {x.dtype}, kernels take {', '.join(map(str, DTYPES))}"
        if result is not None and result.dtype != x.dtype:
            return f"autocast makes {result.dtype} of {x.dtype}"
        return lowering.refuse(node.args)

    def _gate(self, program: Program, node: fx.Node, lowering: Lowering) -> tuple[str, bool]:
        if program.training and not lowering.bank:
            return "training: its backward pass is products that cuBLAS does well", False
        sizes = lowering.sizes(node.args)
        if sizes is None:
            return "nothing is known of its tensors", False
        rows, text = hint(sizes.rows)
        if rows is None:
            return text, False
        verdict = decide(sizes, rows, text, *lowering.forms(sizes, rows), self.graphed)
        return verdict.reason, verdict.pays

    def _put(self, graph: fx.Graph, node: fx.Node, total: fx.Node | None, lowering: Lowering, text: str) -> None:
        at = node if total is None else total
        with graph.inserting_before(at):
            base: Any = None if total is None else total.args[0]
            new = graph.call_function(lowering.kernel, (base, *lowering.build(graph, node.args)))
        replace_meta(new, at, type(self).__name__, text)
        at.replace_all_uses_with(new)
        graph.erase_node(at)
        if total is not None:
            graph.erase_node(node)


_IN_PLACE = {operator.iadd, torch.ops.aten.add_.Tensor, add_delta}


def _sum_of(delta: fx.Node, memory: Memory) -> fx.Node | None:
    """The sum `y + delta` that alone reads the delta, where y has the result's shape and dtype.

    A sum in place is one too where y is new memory that only it sees; into a view (parts of a fused weight) it stays.
    """
    if len(delta.users) != 1:
        return None
    (total,) = delta.users
    if total.op != "call_function" or total.target not in SUMS or len(total.args) != 2 or total.kwargs:
        return None
    y, other = total.args
    if other is not delta or y is delta or not isinstance(y, fx.Node):
        return None
    if total.target in _IN_PLACE and not memory.private(y):
        return None
    if memory.changed(delta.args, delta, total) is not None:
        return None
    whole, base, part = value(total), value(y), value(delta)
    if whole is None or base is None or part is None:
        return None
    same = base.shape == whole.shape == part.shape and base.dtype == whole.dtype == part.dtype
    return total if same and base.device == part.device else None


def with_kernels(pipeline: Pipeline, lower: Lower) -> Pipeline:
    """The pipeline with the kernels' passes, around the first one that rewrites adapters, `Share`."""
    passes: list[Pass] = []
    for step in pipeline:
        if isinstance(step, Share):
            passes.append(lower)
        passes.append(step)
        if isinstance(step, Share):
            passes.append(LowerShared(lower.devices))
    return Pipeline(f"{pipeline.name} with kernels", tuple(passes))
