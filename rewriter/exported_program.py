"""`torch.export.ExportedProgram` in, `ExportedProgram` out.

The program's module is adapted like any graph and exported again: no signature bookkeeping, and names and dynamic
dimensions stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from .capture.skeleton import bare
from .create import graft_adapter
from .errors import CaptureError
from .program import Program
from .spec import Spec


def rewrite_exported(
    program: ExportedProgram, spec: Spec, name: str, *, dtype: torch.dtype | None, update: Any
) -> ExportedProgram:
    """Graft an adapter into an exported program; the input is not changed.

    Raises:
        CaptureError: the program carries no example inputs to be exported again with.
    """
    if program.example_inputs is None:
        raise CaptureError("this ExportedProgram has no example inputs; make it again with torch.export.export")
    gm = program.module(check_guards=False)
    order = [key.removesuffix(".weight") for key in program.state_dict]  # the original model's order
    adapted = graft_adapter(gm, spec, name, dtype=dtype, update=update, order=order)  # type: ignore[arg-type]
    args, kwargs = program.example_inputs
    return torch.export.export(
        adapted, args, dict(kwargs), dynamic_shapes=_dynamic_shapes(program, args, kwargs), strict=False
    )


def _dynamic_shapes(program: ExportedProgram, args: Any, kwargs: Any) -> Any:
    """The dynamic dimensions of a program as a spec for exporting it again: a symbol becomes `Dim.AUTO`."""
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    specs = []
    for user_input in program.graph_signature.user_inputs:
        node = placeholders.get(str(user_input))
        value = node.meta.get("val") if node is not None else None
        if isinstance(value, torch.Tensor):
            dims = {i: Dim.AUTO for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
            specs.append(dims or None)
        else:
            specs.append(None)
    flat, tree = torch.utils._pytree.tree_flatten((args, dict(kwargs)))
    if len(flat) != len(specs):
        raise CaptureError(f"this ExportedProgram has {len(specs)} inputs but {len(flat)} example inputs")
    shaped = torch.utils._pytree.tree_unflatten(specs, tree)
    positional, named = shaped
    if not any(s for s in specs):
        return None
    return (*positional, *named.values()) if not positional or not named else _by_name(program, positional, named)


def _by_name(program: ExportedProgram, positional: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    names = [str(n) for n in program.graph_signature.user_inputs][: len(positional)]
    return {**dict(zip(names, positional, strict=True)), **named}


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
