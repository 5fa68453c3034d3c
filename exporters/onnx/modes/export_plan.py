"""What the forms of an export have in common: which module is traced, what is opened, and what it is held against."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ....backends.artifact.parity import reference, sizes_of
from ....backends.artifact.signature import Axes, Example
from ..graph import open_inputs

Inputs = Mapping[str, torch.Tensor]
Arrays = dict[str, np.ndarray]
# Arguments of a model -> torch's outputs, as the model computes them or in the dtype that is given.
Truth = Callable[..., Arrays]
# What a run feeds beside the inputs, and what must come out: (label, truth, other feeds).
Run = tuple[str, Truth, dict[str, torch.Tensor]]


class Plan(abc.ABC):
    """What the modes have in common. `module` is traced, `truth` runs on the example, `base` is the base model."""

    module: torch.nn.Module
    truth: torch.nn.Module
    base: torch.nn.Module
    name: str | None = None
    sites: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    fingerprint = 0

    def extend(self, example: Example, axes: Axes, dims: dict[str, Any]) -> tuple[Example, Axes, dict[str, Any]]:
        """The example the module is traced with, from the user's."""
        return example, axes, dims

    def open(self, model: Any, ids: Any) -> dict[str, open_inputs.Opened]:
        """Turn adapter tensors into inputs, before the optimizer runs. `ids` is a bank's input for the slots."""
        return {}

    def close(self, model: Any) -> None:  # noqa: B027 (most modes have nothing to undo)
        """Undo, behind the optimizer, what `open` did for its sake only."""

    def about(self) -> dict[str, Any]:
        """What the manifest says of the mode."""
        return {}

    @abc.abstractmethod
    def runs(self, step: int, tensors: Inputs) -> Iterator[Run]:
        """The comparisons to make on these inputs; `step` from 0 up asks for adapters of other sizes."""

    def probes(self, tensors: Inputs) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Runs that need nothing but the graph itself, and the `adapter_ids` they feed beside the inputs."""
        yield "no adapter" if self.sites else "merged", {}


def truth_of(module: torch.nn.Module) -> Truth:
    # A bfloat16 graph is run widened, so what torch rounds at every step is no part of the truth.
    own = torch.float32 if any(parameter.dtype is torch.bfloat16 for parameter in module.parameters()) else None

    def run(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> Arrays:
        return reference(module, inputs, sizes_of(tensors_in(inputs)), dtype or own)

    return run


def tensors_in(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments of a model, those in dicts too."""
    flat = {**inputs, **{k: v for one in inputs.values() if isinstance(one, Mapping) for k, v in one.items()}}
    return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
