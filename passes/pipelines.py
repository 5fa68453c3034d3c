"""The pipelines, in order: which passes run for inference and for training."""

from __future__ import annotations

from ..rewriter.passbase import Pipeline, Program
from .cleanup import Cleanup

inference = Pipeline("inference", (Cleanup(),))
training = Pipeline("training", (Cleanup(),))


def pipeline_for(program: Program) -> Pipeline:
    """The pipeline a program is compiled with."""
    return training if program.training else inference
