"""The pipelines, in order: which passes run for inference, for training, and where nothing will be swapped."""

from __future__ import annotations

from ...rewriter.program import Pipeline, Program
from .accumulate import Accumulate
from .choose import Choose
from .cleanup import Cleanup
from .fold import Fold
from .join_products import JoinProducts
from .share import Share
from .siblings import Siblings

#: adapters stay swappable: their tensors are inputs of the graph
inference = Pipeline("inference", (Cleanup(), Share(), Choose(), Siblings(), Accumulate(), Cleanup()))
#: for programs that must run where fxgraft is not: `Accumulate` calls an operator that this package registers
packaged = Pipeline("packaged", tuple(step for step in inference.passes if not isinstance(step, Accumulate)))
training = Pipeline("training", (Cleanup(), Share(), Siblings(), Accumulate(), Cleanup()))
#: adapters are part of the program for good: for one that owns its tensors (`fg.capture`)
frozen = Pipeline("frozen", (Fold(), *inference.passes[:-1], JoinProducts(), Cleanup()))


def pipeline_for(program: Program) -> Pipeline:
    """The pipeline a program is compiled with."""
    return training if program.training else inference
