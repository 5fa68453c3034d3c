"""The forms a model can be exported in: which module is traced, what is opened, and what it is held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..backends.parity import array
from ..passes.factors import factor_keys, factored, factors
from ..passes.merge import merge
from ..rewriter.api import active, base_of
from ..rewriter.state import find_state
from . import graph, manifest
from .adapterfile import swappable_head
from .errors import ExportError

# What a run feeds beside the inputs, and the torch model it must agree with: (label, model, adapter tensors).
Run = tuple[str, torch.nn.Module, dict[str, np.ndarray]]


class Merged:
    """One plain graph: the adapters are in the weights, and the truth is the adapted model itself."""

    sites: list[str] = []
    trained: dict[str, torch.Tensor] = {}
    fingerprint = 0

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name = name
        if find_state(adapted) is None:  # a model nobody has grafted anything into is its own merged form
            self.module = self.truth = base_of(adapted).eval()
            return
        self.module = merge(adapted, None if name is None else [name]).eval()
        # A chosen adapter need not be the active one; then the merged weights are the only form that has just it.
        self.truth = adapted if name is None or active(adapted) == [name] else self.module

    def open(self, model: Any) -> dict[str, graph.Opened]:
        return {}

    def runs(self, step: int) -> Iterator[Run]:
        yield "merged", self.truth, {}


class Swappable:
    """The base with room for an adapter: two truths, the base model without one and the adapted model with one."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        on = active(adapted)
        if name is None:
            if len(on) != 1:
                raise ExportError(f"a swappable graph is made for one adapter and {len(on)} are active: give name=")
            name = on[0]
        self.name = name
        self.base = base_of(adapted).eval()
        self.pairs = factors(adapted, name)
        self.trained = swappable_head(adapted, name)
        self.keys = factor_keys(adapted, name)
        self.module = factored(adapted, name).eval()
        self.truth = adapted if on == [name] else self.module
        self.sites = sorted(self.pairs)
        self.fingerprint = manifest.fingerprint(self.base, self.sites)

    def open(self, model: Any) -> dict[str, graph.Opened]:
        state = self.base.state_dict()
        heads = graph.open_trained(model, {key: state[key] for key in self.trained})
        return {**graph.open_factors(model, self.keys), **heads}

    def runs(self, step: int) -> Iterator[Run]:
        yield "no adapter", self.base, {}
        feeds = {key: array(tensor) for key, tensor in self.trained.items()}
        for site, (a, b) in self.pairs.items():
            # Zero columns change nothing but the rank: the graph must not remember the one it was traced with.
            feeds[f"{site}.A"] = np.pad(array(a), ((0, 0), (0, step)))
            feeds[f"{site}.B"] = np.pad(array(b), ((0, step), (0, 0)))
        yield f"adapter {self.name!r}" + (f", rank + {step}" if step else ""), self.truth, feeds
