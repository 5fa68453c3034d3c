"""Merged weights back in the format that the base's are in, and what that loses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.errors import listing
from ...rewriter.quantised.quantised import quantised


@torch.no_grad()
def requantise(plain: Mapping[str, nn.Module], base: Mapping[str, nn.Module], paths: list[str]) -> None:
    """Let the merged linear layers at these paths be quantised layers as the base's are, in place.

    Says how far the merged weights move, against what the adapters had changed.

    Args:
        plain: the modules of the merged model, by path; those of `base` are given up.

    Raises:
        MergeError: a format that cannot be quantised again.
    """
    lost: dict[str, tuple[float, float]] = {}
    for path in paths:
        merged, layer = plain[path], base[path]
        kind = quantised(layer)
        assert kind is not None
        wanted: Any = merged._parameters["weight"]
        bias = merged._parameters["bias"]
        before = kind.weight(layer).to(wanted.dtype)
        _put_bias(layer, bias)
        kind.put(layer, wanted.detach())
        after = kind.weight(layer).to(wanted.dtype)
        change = (wanted - before).norm()
        lost[path] = (_ratio((after - wanted).norm(), wanted.norm()), _ratio((after - wanted).norm(), change))
        merged.__dict__.clear()
        merged.__dict__.update(layer.__dict__)
        merged.__class__ = type(layer)
    worst = max(lost, key=lambda path: lost[path][1])
    relative = sum(value for value, _ in lost.values()) / len(lost)
    drowned = [path for path, (_, ratio) in lost.items() if ratio > 1]
    warnings.warn(
        f"merge(requantise=True): quantising moves the merged weights of {len(lost)} layer(s) by {relative:.1%} on "
        f"average, at worst by {lost[worst][1]:.1f} times what the adapters had changed ({worst!r})"
        + (f"; it outweighs the adapters in {len(drowned)}: {listing(drowned, 4)}" if drowned else ""),
        stacklevel=3,
    )


def _put_bias(layer: nn.Module, bias: Tensor | None) -> None:
    """The merged bias, as the layer holds its own."""
    held: Any = getattr(layer, "bias", None)
    if bias is None:
        return
    value = bias.detach().to(bias.dtype if held is None else held.dtype)
    if "bias" in layer._parameters:
        layer._parameters["bias"] = nn.Parameter(value, requires_grad=False)
    elif "bias" in layer._buffers:
        layer._buffers["bias"] = value
    else:
        layer.__dict__["bias"] = value


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else float("inf")
