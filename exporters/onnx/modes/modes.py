"""The forms a model can be exported in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ....passes.models.merge import merge
from ....rewriter.state import find_state
from ....rewriter.switch import active_weights, base_of
from .bank_mode import Banked
from .export_plan import Inputs, Plan, Run, truth_of
from .one_adapter import Own, Swappable


class Merged(Plan):
    """One plain graph: the adapters are in the weights, and the truth is the adapted model itself."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name, self.base = name, base_of(adapted).eval()
        if find_state(adapted) is None:  # a model nobody has grafted anything into is its own merged form
            self.module = self.truth = self.base
            return
        self.module = merge(adapted, None if name is None else [name]).eval()
        # A chosen adapter need not be the active one; then the merged weights are the only form that has just it.
        self.truth = adapted if name is None or active_weights(adapted) == {name: 1} else self.module

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        yield "merged", truth_of(self.truth), {}


def make_plan(
    adapted: torch.nn.Module, mode: str, name: str | None, expanded: bool, capacity: int | None, rank: int | None
) -> Plan:
    """The plan of a mode of `export_onnx`, with its options."""
    if mode == "bank":
        return Banked(adapted, name, capacity, rank)
    if mode == "merged":
        return Merged(adapted, name)
    return Swappable(adapted, name) if expanded else Own(adapted, name)
