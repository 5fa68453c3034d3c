"""Random inputs that look like an example: what is needed to draw them fits into JSON and holds no input itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .signature import Axes, Example

_POOL = 1024  # integers are drawn from at most as many of the example's own


def describe_inputs(example: Example, given: bool = False) -> dict[str, dict[str, Any]]:
    """For every input its dtype, its shape and where its values come from, ready for JSON. With `given`, integers and
    booleans are the example's own, in its shape.

    Floating inputs are normal with the example's mean and spread; integers and booleans are drawn from the example's
    own values, so that token ids stay in range; masks keep a run of ones in every row, at the example's side; a count
    from 0 up stays one.
    """
    return {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            **(
                {"kind": "given", "values": t.tolist()}
                if given and not t.is_floating_point()
                else {"kind": "ones"}
                if name in example.ones
                else _values(name, t.detach().cpu())
            ),
        }
        for name, t in example.tensors.items()
    }


def _values(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    if not tensor.numel():
        return {"kind": "empty"}
    if tensor.is_floating_point() and "mask" not in name:
        wide = tensor.double()
        return {"kind": "normal", "mean": wide.mean().item(), "spread": max(wide.std(unbiased=False).item(), 1e-3)}
    if "mask" in name and tensor.dim() == 2 and bool(((tensor == 0) | (tensor == 1)).all()):
        return {"kind": "mask", "left": bool((tensor[:, 0] == 0).any())}
    if tensor.dim() == 1 and not tensor.is_floating_point() and tensor.equal(torch.arange(len(tensor)).to(tensor)):
        return {"kind": "count"}
    pool = tensor.flatten().unique()
    if len(pool) > _POOL:
        pool = pool[torch.linspace(0, len(pool) - 1, _POOL).long()]
    return {"kind": "choice", "values": pool.tolist()}


def draw(
    described: Mapping[str, Mapping[str, Any]], axes: Axes, sizes: Mapping[str, int], seed: int
) -> dict[str, torch.Tensor]:
    """Inputs on the CPU from `describe_inputs`, the axes named in `sizes` of these sizes. A seed gives the same values
    on every machine."""
    made = {}
    for name, about in described.items():
        named = axes.get(name, {})
        shape = [sizes.get(named.get(axis, ""), size) for axis, size in enumerate(about["shape"])]
        values = _drawn(about, shape, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        made[name] = torch.from_numpy(values).to(getattr(torch, about["dtype"]))
    return made


def _drawn(about: Mapping[str, Any], shape: list[int], generator: np.random.Generator) -> np.ndarray:
    kind = about["kind"]
    if kind == "given":
        return np.asarray(about["values"]).reshape(shape)
    if kind == "normal":
        return np.asarray(generator.standard_normal(shape) * about["spread"] + about["mean"])
    if kind == "mask":
        rows, length = shape
        kept = generator.integers(1, length + 1, (rows, 1))
        kept[0] = length
        places = np.arange(length)
        return (places >= length - kept) if about["left"] else (places < kept)
    if kind == "ones":
        return np.ones(shape)
    if kind == "count":
        return np.arange(shape[0])
    if kind == "choice":
        return np.asarray(generator.choice(np.array(about["values"]), shape))
    return np.zeros(shape)


def fresh(
    example: Example, axes: Axes, sizes: Mapping[str, int], seed: int, given: bool = False
) -> dict[str, torch.Tensor]:
    """Random inputs of the given sizes that look like the example, on its devices; `given` as for
    `describe_inputs`."""
    made = draw(describe_inputs(example, given), axes, sizes, seed)
    return {name: tensor.to(example.tensors[name].device) for name, tensor in made.items()}
