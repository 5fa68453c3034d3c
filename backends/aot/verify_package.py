"""A package against torch, before its file appears: other sizes, size 1, other adapter values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...rewriter.errors import ExportError
from ...rewriter.tensors import swap
from ..artifact.parity import Parity, array, hold, reference, sizes_of
from ..artifact.random_inputs import fresh
from ..artifact.signature import Axes, Example, named_tensors, other_sizes
from .loaded_package import Package


def one_sized(package: Package, model: nn.Module, example: Example, axes: Axes, tolerance: float, seed: int) -> None:
    """Raise an axis' minimum to 2 where torch or the package does not run with 1, or they differ.

    torch exports every dynamic axis for sizes from 2 up; whether the code is right for 1 is a question of the model.
    """
    limits = package.manifest["axes"]
    for label, limit in limits.items():
        if limit["min"] > 1:
            continue
        sizes = _sizes(example, axes) | {label: 1}
        try:
            _compared(package, model, example, fresh(example, axes, sizes, seed), f"{label} 1", tolerance)
        except ExportError:
            limit["min"] = 2


def verify(
    package: Package, model: nn.Module, example: Example, axes: Axes, tolerance: float, seed: int
) -> list[Parity]:
    """Compare on the example, on other sizes, and there with other values in every adapter. Changes the adapters of
    `package` and `model`. Raises `ParityError`."""
    checks = [_compared(package, model, example, example.tensors, "example", tolerance)]
    limits = package.manifest["axes"]
    tensors: Mapping[str, Tensor] = example.tensors
    for step, asked in enumerate(other_sizes(example, axes) or [{}], start=1):
        sizes = {label: _within(size, limits[label]) for label, size in asked.items()}
        tensors = fresh(example, axes, sizes, seed + step)
        checks.append(_compared(package, model, example, tensors, f"random {step}", tolerance))
    generator = torch.Generator().manual_seed(seed)
    for name in package.adapters:
        other = {key: _moved(tensor, generator) for key, tensor in package.adapter_state(name).items()}
        swap(model, other, name)
        package.swap(other, name)
        checks.append(_compared(package, model, example, tensors, f"other values in {name!r}", tolerance))
    return checks


def _compared(
    package: Package, model: nn.Module, example: Example, tensors: Mapping[str, Tensor], case: str, tolerance: float
) -> Parity:
    sizes = sizes_of(tensors)
    expected = reference(model, {**tensors, **example.constants}, sizes)
    try:
        output = package(**tensors)
    except RuntimeError as error:  # of the compiled code
        raise ExportError(f"the compiled model fails ({case}; {sizes}): {error}") from error
    results = {name: array(tensor) for name, tensor in named_tensors(output).items()}
    return hold(results, expected, "the package", case, sizes, tolerance)


def _sizes(example: Example, axes: Axes) -> dict[str, int]:
    return {label: example.tensors[key].shape[axis] for key, named in axes.items() for axis, label in named.items()}


def _within(size: int, limit: Mapping[str, int | None]) -> int:
    low, high = limit["min"] or 1, limit["max"]
    return max(low, size if high is None else min(size, high))


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Other values of the same scale; zeros become small."""
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std(unbiased=False).clamp_min(0.02)
    return (tensor.float() + noise).to(tensor.dtype)
