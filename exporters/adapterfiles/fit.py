"""Holding an adapter's tensors against a graph.

onnxruntime checks names, dtypes and shapes only while running, and takes a partial adapter without a word. Here an
adapter is complete and fits, or it is refused at load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...rewriter.errors import AdapterError, listing
from ...rewriter.forms import RANK
from .adapter_inputs import axis_of, site_of, sites_of, tensor_of
from .ort_values import TYPES, TensorInfo


def check_fit(
    adapter: str, values: Mapping[str, torch.Tensor], graph: Mapping[str, TensorInfo], partial: bool = False
) -> dict[str, int]:
    """Hold an adapter's tensors against the graph's adapter inputs; returns the rank per site.

    Raises `AdapterError` naming the tensors: unknown to the graph, missing (part of a site always, a whole site
    unless `partial`), of another dtype, of another shape, a site's tensors of different ranks, not finite.
    """
    unknown = sorted(set(values) - set(graph))
    if unknown:
        raise AdapterError(
            f"adapter {adapter!r} has tensors the graph does not take: {listing(unknown)}; it takes {listing(graph)}"
        )
    missing = [name for name in graph if name not in values]
    begun = sites_of({name: info.shape for name, info in graph.items()}).keys() & set(map(site_of, values))
    halves = [name for name in missing if site_of(name) in begun]
    if halves or (missing and not partial):
        raise AdapterError(
            f"adapter {adapter!r} is incomplete: {listing(halves or missing)} "
            f"{'is' if len(halves or missing) == 1 else 'are'} missing of the graph's {len(graph)} adapter tensors"
            + ("" if halves else " (partial=True leaves those at the base's values)")
        )
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in values.items():
        info = graph[name]
        if value.dtype is not TYPES.get(info.type):
            got = str(value.dtype).removeprefix("torch.")
            hint = f"; it would be rounded: bring the adapted model to {info.dtype} and write it from there"
            raise AdapterError(
                f"adapter {adapter!r}: {name!r} is {got}, the graph takes {info.dtype}"
                + (hint if value.is_floating_point() and TYPES[info.type].is_floating_point else "")
            )
        shape = tuple(value.shape)
        fits = len(shape) == len(info.shape) and all(
            not isinstance(want, int) or want == size for want, size in zip(info.shape, shape, strict=True)
        )
        if not fits:
            raise AdapterError(f"adapter {adapter!r}: {name!r} has shape {shape}, the graph takes {info}")
        for symbol, size in zip(info.shape, shape, strict=True):
            if not isinstance(symbol, str):
                continue
            other, first = sizes.setdefault(symbol, (size, name))
            if other != size:
                site, axis = site_of(name), axis_of(symbol)
                both = " and ".join(one[len(site) + 1 :] for one in (first, name))
                raise AdapterError(
                    f"adapter {adapter!r}: {both} of {site!r} have different "
                    f"{'ranks' if axis == RANK else f'numbers of {axis}'}, {other} and {size}"
                )
        if not finite(value):
            raise AdapterError(f"adapter {adapter!r}: {name!r} has values that are not finite")
    return {site_of(symbol): size for symbol, (size, _) in sizes.items() if axis_of(symbol) == RANK}


def widened_to(values: Mapping[str, torch.Tensor], graph: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Floating tensors in the graph's dtype where that holds every value they can have: float16 and bfloat16 in
    float32, all of them in float64. Others stay as they are, for `check_fit` to refuse."""
    wanted = {name: TYPES.get(graph[name].type) for name in values if name in graph}
    return {
        name: value.to(kind)
        if (kind := wanted.get(name)) is not None and kind in _WIDER.get(value.dtype, ())
        else value
        for name, value in values.items()
    }


_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def check_config(adapter: str, given: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    """Hold an adapter's description against that of a graph that takes the method's own tensors."""
    if given is None:
        raise AdapterError(
            f"adapter {adapter!r} holds expanded tensors, and the graph takes the method's own: write it with "
            "export_ort_adapter(expanded=False), or export the graph with expanded=True"
        )
    ours, theirs = ([(group["method"], group["sites"]) for group in said["groups"]] for said in (own, given))
    if ours != theirs:
        methods = [[method for method, _ in groups] for groups in (theirs, ours)]
        raise AdapterError(
            f"adapter {adapter!r} has another config than the graph, which does the method's arithmetic: "
            + (f"{methods[0]} and not {methods[1]}" if methods[0] != methods[1] else "it is of other sites")
            + "; a graph exported with expanded=True takes both"
        )


def one_slot(stacks: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The stacks of a bank `(slots, ...)` as inputs for one adapter."""
    inputs = [TensorInfo(tensor_of(name), info.shape[1:], info.type) for name, info in stacks.items()]
    return {info.name: info for info in inputs}


def check_room(adapter: str, values: Mapping[str, torch.Tensor], stacks: Mapping[str, torch.Tensor]) -> None:
    """Raise `AdapterError` where an adapter's rank is larger than a slot's."""
    for name, stack in stacks.items():
        value, room = values.get(tensor_of(name)), tuple(stack.shape[1:])
        if value is not None and any(size > most for size, most in zip(value.shape, room, strict=True)):
            raise AdapterError(
                f"adapter {adapter!r}: {name!r} is {tuple(value.shape)} and a slot of the bank takes up to {room}: "
                "give OrtSession a larger rank, or export the bank with one"
            )


def finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite. A finite sum says so in one pass; one that is not may only have overflowed."""
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def overlap(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Tensors two adapters both set."""
    return sorted(set(first) & set(second))
