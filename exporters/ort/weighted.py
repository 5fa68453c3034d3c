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
from ..adapterfiles.ort_values import Device, to_ort, to_torch
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

    def __init__(self, device: Device) -> None:
        self._device = device
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
        made = {name: to_ort(tensor, self._device) for name, tensor in _sum(adapters, weights).items()}
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEEP:
                self._kept.popitem(last=False)
        return made


def _sum(adapters: Sequence[LoadedAdapter], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    sites: dict[str, dict[str, list[tuple[torch.Tensor, float]]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        whole = [name for name in adapter.values if name.rpartition(".")[0] not in adapter.ranks]
        if whole:
            raise AdapterError(
                f"adapter {adapter.name!r} sets {listing(whole)} in whole, which has no weighted sum with others': "
                "run it alone and without a weight, or combine adapters in torch (fg.combine) before the export"
            )
        for name, value in adapter.values.items():
            site, _, leg = name.rpartition(".")
            sites.setdefault(site, {}).setdefault(leg, []).append((to_torch(value), weight))
    made: dict[str, torch.Tensor] = {}
    for site, legs in sites.items():
        if set(legs) != {"A", "B"} and len(legs["B"]) > 1:
            raise AdapterError(
                f"the adapters at {site!r} choose among experts by the input, so their sum is no adapter of this form: "
                "give one of them a weight, or export them merged"
            )
        for leg, parts in legs.items():
            if leg == "B":  # the rank is the dimension before the last
                parts = [((tensor.float() * weight).to(tensor.dtype), weight) for tensor, weight in parts]
                made[f"{site}.{leg}"] = torch.cat([tensor for tensor, _ in parts], dim=-2)
            else:
                made[f"{site}.{leg}"] = torch.cat([tensor for tensor, _ in parts], dim=-1)
    return made
