"""Holding an adapter's tensors against a graph.

onnxruntime checks names, dtypes and shapes only while running, and takes a partial adapter without a word. Here an
adapter is complete and fits, or it is refused at load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from ..rewriter.errors import AdapterError, listing
from .ort_values import TYPES, TensorInfo


def check_fit(
    adapter: str, values: Mapping[str, torch.Tensor], graph: Mapping[str, TensorInfo], partial: bool = False
) -> dict[str, int]:
    """Hold an adapter's tensors against the graph's adapter inputs; returns the rank per site.

    Raises `AdapterError` naming the tensors: unknown to the graph, missing (a site with one of A and B always; with any
    missing site unless `partial`), of another dtype, of another shape, A and B of different ranks, not finite.
    """
    unknown = sorted(set(values) - set(graph))
    if unknown:
        raise AdapterError(
            f"adapter {adapter!r} has tensors the graph does not take: {listing(unknown)}; it takes {listing(graph)}"
        )
    missing = [name for name in graph if name not in values]
    halves = [name for name in missing if _partner(name) in values]
    if halves or (missing and not partial):
        raise AdapterError(
            f"adapter {adapter!r} is incomplete: {listing(halves or missing)} "
            f"{'is' if len(halves or missing) == 1 else 'are'} missing of the graph's {len(graph)} adapter tensors"
            + ("" if halves else " (partial=True leaves those at the base's values)")
        )
    ranks: dict[str, int] = {}
    for name, value in values.items():
        info = graph[name]
        if value.dtype is not TYPES.get(info.type):
            got = str(value.dtype).removeprefix("torch.")
            raise AdapterError(f"adapter {adapter!r}: {name!r} is {got}, the graph takes {info.dtype}")
        shape = tuple(value.shape)
        fits = len(shape) == len(info.shape) and all(
            not isinstance(want, int) or want == size for want, size in zip(info.shape, shape, strict=True)
        )
        if not fits:
            raise AdapterError(f"adapter {adapter!r}: {name!r} has shape {shape}, the graph takes {info}")
        site, _, leg = name.rpartition(".")
        free = [size for want, size in zip(info.shape, shape, strict=True) if not isinstance(want, int)]
        if leg in ("A", "B") and free and ranks.setdefault(site, free[0]) != free[0]:
            raise AdapterError(
                f"adapter {adapter!r}: A and B of {site!r} have different ranks, {ranks[site]} and {free[0]}"
            )
        if not finite(value):
            raise AdapterError(f"adapter {adapter!r}: {name!r} has values that are not finite")
    return ranks


def one_slot(stacks: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The stacks of a bank `(K, ...)` as inputs for one adapter, whose rank is free up to what `check_room` allows."""
    slots = {}
    for name, info in stacks.items():
        shape = list(info.shape[1:])
        site, _, leg = name.rpartition(".")
        if leg in ("A", "B") and _partner(name) in stacks:
            shape[1 if leg == "A" else 0] = f"{site}.rank"
        slots[name] = TensorInfo(name, tuple(shape), info.type)
    return slots


def check_room(adapter: str, values: Mapping[str, torch.Tensor], stacks: Mapping[str, TensorInfo]) -> None:
    """Raise `AdapterError` where an adapter's rank is larger than a slot's."""
    for name, value in values.items():
        room = stacks[name].shape[1:]
        if any(isinstance(most, int) and size > most for size, most in zip(value.shape, room, strict=True)):
            raise AdapterError(
                f"adapter {adapter!r}: {name!r} is {tuple(value.shape)} and a slot of the bank takes up to {room}: "
                "export the bank with a larger rank"
            )


def finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite. A finite sum says so in one pass; one that is not may only have overflowed."""
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def _partner(name: str) -> str:
    site, _, leg = name.rpartition(".")
    return {"A": f"{site}.B", "B": f"{site}.A"}.get(leg, name)


def overlap(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Tensors two adapters both set."""
    return sorted(set(first) & set(second))
