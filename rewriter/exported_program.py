"""`capture`: the whole graph of a model, to run passes on by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from .capture.skeleton import bare
from .errors import CaptureError
from .program import Program
from .program_verbs import over_programs


@over_programs
def capture(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any], dynamic_shapes: Any = None
) -> Program:
    """The whole graph of a model, with every adapter as one dialect node, to run passes on by hand.

    Args:
        model: adapted or not; it is captured in the mode (train or eval) it is in.
        example_inputs: a tuple, or a dict of keyword arguments. A dynamic dimension needs an example size of 2 or
            more: torch specialises sizes 0 and 1.
        dynamic_shapes: as for `torch.export.export`.

    Raises:
        CaptureError: the model cannot be exported; the text carries torch's reason.
    """
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    check_dynamic_sizes(args or kwargs, dynamic_shapes)
    try:
        exported = torch.export.export(bare(model), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured: {type(error).__name__}: {error}") from error
    module = exported.module(check_guards=False)
    return Program(module, tuple(args or kwargs.values()), training=model.training, exported=exported)  # type: ignore[arg-type]


def check_dynamic_sizes(example_inputs: Any, dynamic_shapes: Any) -> None:
    """Raise `CaptureError` where a dimension that shall be dynamic has size 0 or 1 in the example."""
    if dynamic_shapes is None:
        return
    items = example_inputs.items() if isinstance(example_inputs, Mapping) else enumerate(example_inputs)
    ordered = list(dynamic_shapes.values()) if isinstance(dynamic_shapes, Mapping) else list(dynamic_shapes)
    for position, (key, value) in enumerate(items):
        if isinstance(dynamic_shapes, Mapping) and key in dynamic_shapes:
            spec = dynamic_shapes[key]
        else:
            spec = ordered[position] if position < len(ordered) else None
        if not isinstance(value, torch.Tensor) or not spec:
            continue
        dims = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
        for dim, how in dims:
            if how is not None and how is not Dim.STATIC and value.shape[dim] < 2:
                raise CaptureError(
                    f"input {key!r}: dimension {dim} shall be dynamic but its example size is {value.shape[dim]}, and "
                    "torch.export would fix it to that silently; give an example with size 2 or more"
                )
