"""Graphs that take one adapter: as its form's tensors, or as the method's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....passes.models.opened import base_weights, opened, whole_weights
from ....rewriter.analysis.dataflow import tied_names
from ....rewriter.capture.skeleton import copy_skeleton
from ....rewriter.errors import ExportError
from ....rewriter.state import record_of
from ....rewriter.switch import active_weights, base_of, set_active
from ...adapterfiles import graph_manifest as manifest
from ...adapterfiles.adapter_inputs import at_site
from ...adapterfiles.export_adapter import swappable_head
from ...adapterfiles.structured import describe, own_keys, own_tensors
from ..graph import open_inputs
from .export_plan import Inputs, Plan, Run, truth_of
from .twin_inputs import legs_of, randomised


class Swappable(Plan):
    """The base with room for an adapter: two truths, the base model without one and the adapted model with one."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name, self.truth = one_active(adapted, name)
        self.base = base_of(adapted).eval()
        self.twin = opened(adapted, self.name)
        self.module = self.twin.module.eval()
        self.head = swappable_head(adapted, self.name)
        state = self.base.state_dict()
        self.defaults = {key: state[key] for key in self.head} | base_weights(self.base, self.twin.whole)
        self.trained = tuple(sorted(self.defaults))
        self.sites = tuple(sorted(site.name for site in record_of(adapted, self.name).sites))
        self.fingerprint = manifest.fingerprint(self.base, self.sites)

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        # Of tied tensors the graph has one, under either name.
        ties, there = tied_names(self.module), model.graph.initializers
        keys = {key: next((n for n in sorted(ties.get(key, ())) if n in there), key) for key in self.defaults}
        heads = open_inputs.open_trained(model, self.defaults, {k: n for k, n in keys.items() if k not in there})
        return {**open_inputs.open_sites(model, legs_of(self.twin)), **heads}

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        yield "no adapter", truth_of(self.base), {}
        feeds = {**self.head, **self.twin.whole}
        for site, (form, values) in self.twin.sites.items():
            # The graph must not remember the sizes it was traced with.
            feeds |= at_site(site, form.grown(values, step) if step else values)
        larger = f", rank + {step}" if step and self.twin.sites else ""
        yield f"adapter {self.name!r}{larger}", truth_of(self.truth), feeds
        if not step and self.twin.sites:
            truth, loud = randomised(self.twin, truth_of(self.module))
            yield "random adapter", truth, {**self.head, **self.twin.whole, **loud}


class Own(Plan):
    """The model with its adapter's own tensors as inputs: the graph does the method's arithmetic. Zeros are no adapter:
    every method's delta is a product with a tensor that starts at zero, or of the vector itself."""

    def __init__(self, adapted: torch.nn.Module, name: str | None):
        self.name, self.truth = one_active(adapted, name)
        self.module = self.truth
        self.base = base_of(adapted).eval()
        whole_weights(adapted, self.name)  # a supernet says here that it has no one path yet
        own, frozen = own_tensors(self.truth, self.name)
        self.values = {**own, **frozen}
        self.keys = own_keys(self.truth, self.name)
        state, head = self.base.state_dict(), swappable_head(adapted, self.name)
        self.defaults = {
            key: state[key] if key in head else torch.zeros_like(tensor) if tensor.is_floating_point() else tensor
            for key, tensor in self.values.items()
        }
        self.trained = tuple(sorted(self.defaults))
        self.described = describe(adapted, self.name)
        self.sites = tuple(sorted(site.name for site in record_of(adapted, self.name).sites))
        self.fingerprint = manifest.fingerprint(self.base, self.sites)

    def about(self) -> dict[str, Any]:
        return {"own": self.described}

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        return open_inputs.open_trained(model, self.defaults, self.keys)

    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        yield "no adapter", truth_of(self.base), {}
        yield f"adapter {self.name!r}", truth_of(self.truth), self.values


def one_active(adapted: torch.nn.Module, name: str | None) -> tuple[str, torch.nn.Module]:
    """The adapter's name, and a model in which it alone is active."""
    on = active_weights(adapted)
    if name is None:
        if len(on) != 1:
            raise ExportError(f"a swappable graph is made for one adapter and {len(on)} are active: give name=")
        ((name, weight),) = on.items()
        if weight != 1:
            raise ExportError(
                f"{name!r} is active with a weight of {weight}, and a swappable graph takes adapters as they are: give "
                f"name={name!r}, or make the weight part of an adapter (fg.combine)"
            )
    return name, adapted if on == {name: 1} else alone(adapted, name)


def alone(adapted: torch.nn.Module, name: str) -> torch.nn.Module:
    record_of(adapted, name)
    twin = copy_skeleton(adapted)
    set_active(twin, [name])
    return twin.eval()
