"""Adapters under weights in one run: `adapter={"a": 0.7, "b": -0.2}` of a swappable session.

    x A_a B_a * 0.7 + x A_b B_b * -0.2  =  x [A_a A_b] [0.7 B_a; -0.2 B_b]

Exact, as the rank of a swappable graph is free. A form that is not linear in its tensors (HydraLoRA's routers) has this
for one adapter only, and whole tensors (trained heads, GLoRA) have none.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...rewriter.errors import AdapterError, listing
from ..adapterfiles.adapter_inputs import at_site, site_of, sites_of
from ..adapterfiles.ort_values import Device, TensorInfo, to_ort, to_torch
from .adapter_cache import LoadedAdapter

_KEEP = 8  # combinations in memory


def check_weights(adapter: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers by adapter name. Raises `AdapterError`."""
    wrong = {
        name: weight
        for name, weight in adapter.items()
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight)
    }
    if wrong or not adapter:
        raise AdapterError(f"adapter={dict(adapter)!r}: give a finite number for every name, as in {{'a': 0.7}}")
    return {name: float(weight) for name, weight in adapter.items()}


class Combiner:
    """Makes the tensors of weighted adapters, and keeps the latest. Safe to share between threads."""

    def __init__(self, device: Device, graph: Mapping[str, TensorInfo]) -> None:
        self._device = device
        self._forms = sites_of({name: info.shape for name, info in graph.items()})
        self._kept: OrderedDict[Any, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, adapters: Sequence[LoadedAdapter], weights: Sequence[float]) -> dict[str, Any]:
        """The graph's inputs. Raises `AdapterError` where these adapters have no weighted sum in it."""
        if list(weights) == [1.0]:
            return adapters[0].values
        key = tuple((one.name, one.serial, weight) for one, weight in zip(adapters, weights, strict=True))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = {name: to_ort(tensor, self._device) for name, tensor in self._sum(adapters, weights).items()}
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEEP:
                self._kept.popitem(last=False)
        return made

    def _sum(self, adapters: Sequence[LoadedAdapter], weights: Sequence[float]) -> dict[str, torch.Tensor]:
        for adapter in adapters:
            if whole := [name for name in adapter.values if self._forms.get(site_of(name)) is None]:
                raise AdapterError(
                    f"adapter {adapter.name!r} sets {listing(whole)} in whole, which has no weighted sum with others': "
                    "run it alone and without a weight, or combine adapters in torch (fg.combine) before the export"
                )
        made: dict[str, torch.Tensor] = {}
        for site, form in self._forms.items():
            there = [(one.values, w) for one, w in zip(adapters, weights, strict=True) if site in one.ranks]
            if form is None or not there:
                continue
            if form.no_sum and len(there) > 1:
                raise AdapterError(
                    f"the adapters at {site!r} {form.no_sum}, so their sum is no adapter of this form: give one of "
                    "them a weight, or export them merged"
                )
            parts = [({name: to_torch(values[f"{site}.{name}"]) for name in form.axes}, w) for values, w in there]
            made |= at_site(site, form.weighted(parts))
        return made
