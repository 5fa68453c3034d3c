"""What a package's manifest says about the model: its call, its sizes, its adapters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...rewriter.adapter_state import methods_of, methods_to_dict
from ...rewriter.errors import ExportError
from ...rewriter.state import record_of
from ...rewriter.tensors import adapter_modules, adapter_state, trained_modules
from ..artifact.signature import Axes, Example, named_tensors, symbols


def describe_call(model: nn.Module, example: Example, output: Any, axes: Axes) -> dict[str, Any]:
    """The inputs, with a name for every dynamic axis, the constants and the form of the output."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        "model": type(model).__name__,
        "dtypes": sorted({_plain(p.dtype) for p in model.parameters() if p.is_floating_point()}),
        "positional": [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)],
        "inputs": {
            name: {
                "dtype": _plain(tensor.dtype),
                "shape": [axes.get(name, {}).get(axis, size) for axis, size in enumerate(tensor.shape)],
            }
            for name, tensor in example.tensors.items()
        },
        "constants": example.constants,
        "outputs": form_of(output),
        "output_names": list(named_tensors(output)),
    }


def dynamic_axes(
    exported: torch.export.ExportedProgram, axes: Axes, dims: Mapping[str, Any], explicit: bool
) -> tuple[Axes, dict[str, dict[str, Any]]]:
    """The axes that torch kept dynamic, one name for each size, and `{name: {"min", "max"}}` of each."""
    names, fixed = symbols(exported.graph, axes)
    for key, axis, label, size in fixed:
        if explicit or label == "batch":
            raise ExportError(
                f"the model fixes axis {axis} ({label!r}) of input {key!r} to {size}: it computes with the number, "
                "not with the input's size. Leave the axis out of dynamic_shapes, or change the model"
            )
    if tied := [symbol for symbol in names if not symbol.isidentifier()]:
        raise ExportError(
            f"the model ties the size of {names[tied[0]]!r} to another one ({tied[0]}), which cannot be checked at a "
            "call: fix that axis with dynamic_shapes"
        )
    gone = {(key, axis) for key, axis, _, _ in fixed}
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    ranges = {str(symbol): found for symbol, found in exported.range_constraints.items()}
    kept: Axes = {}
    limits: dict[str, dict[str, Any]] = {}
    for key, labels in axes.items():
        for axis in labels:
            if (key, axis) in gone:
                continue
            symbol = str(values[key].shape[axis].node.expr)
            label = names[symbol]
            kept.setdefault(key, {})[axis] = label
            # 2 is torch's own lower bound for every symbol, unless a Dim says so; size 1 is tried later.
            asked = getattr(dims[key][axis], "min", 0)
            low, high = int(ranges[symbol].lower), ranges[symbol].upper
            low = low if low > 2 or asked == 2 else 1
            limit = limits.setdefault(label, {"min": low, "max": None})
            limit["min"] = max(limit["min"], low)
            if high.is_Integer:  # else torch's infinity
                limit["max"] = min(int(high), limit["max"] or int(high))
    return kept, limits


def describe_adapter(twin: nn.Module, name: str, held: set[Any]) -> dict[str, Any]:
    """One adapter for the manifest. `constant` is a tensor's name in the compiled code, None where nothing reads it."""
    record = record_of(twin, name)
    names = {id(t): fqn for fqn, t in [*twin.named_parameters(), *twin.named_buffers()]}
    tensors: dict[str, tuple[Tensor, str]] = {}
    for prefix, module in adapter_modules(twin, name, record):
        for key, tensor in module.tensors().items():
            role = "trainable" if key in module._parameters else "frozen"
            tensors[prefix + key] = tensor, role
    for path, head in trained_modules(twin, name, record).items():
        for key, tensor in head.state_dict(keep_vars=True).items():
            tensors[f"{path}.{key}"] = tensor, "head"
    described = {}
    for key in adapter_state(twin, name):
        tensor, role = tensors[key]
        fqn = names[id(tensor)]
        described[key] = {
            "constant": fqn if fqn in held else None,
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "dtype": _plain(tensor.dtype),
            "role": role,
        }
    return {
        "method": record.spec.method.key,
        "spec": record.spec.to_dict(),
        "methods": methods_to_dict(methods_of(record)),
        "tensors": described,
    }


def form_of(output: Any) -> Any:
    """The form of an output, for JSON: a name for a tensor (those of `named_tensors`), `{"mapping": [[key, form]]}`,
    `{"tuple": [form]}`, `{"list": [form]}`, or None."""

    names = iter(named_tensors(output))

    def form(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return next(names)
        if isinstance(value, Mapping):
            return {"mapping": [[key, form(entry)] for key, entry in value.items()]}
        return {"list" if isinstance(value, list) else "tuple": [form(entry) for entry in value]}

    return form(output)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
