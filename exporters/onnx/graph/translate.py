"""From a torch module to an unoptimised onnx_ir graph: traced by `torch.export`, translated by `torch.onnx`."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ....backends.artifact.signature import Axes
from ....rewriter.errors import ExportError
from ....rewriter.method import ADAPTER_IDS
from .flat_call import FlatCall
from .translations import translations


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's remarks (missing torchvision, renamed symbols, skipped deduplication) off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(call: FlatCall, dims: Mapping[str, Any]) -> torch.export.ExportedProgram:
    try:
        with quiet():
            program = torch.export.export(call.module, (), call.inputs, dynamic_shapes=call.dims(dims), strict=False)
    except ExportError:
        raise
    except Exception as error:  # torch.export raises a dozen unrelated classes
        said = _brief(error)
        for name, place in call.names.items():
            said = re.sub(rf"\b{place}\b", name, said)
        raise ExportError(f"torch.export cannot trace the model: {said}{_of_experts(call.module)}") from error
    if way := _of_experts(call.module):
        experts = next((n.name for n in program.graph.nodes if "grouped_mm" in str(n.target)), None)
        if experts is not None:
            raise ExportError(f"ONNX has no product like {experts!r} of the traced model{way}")
    return program


def _of_experts(model: torch.nn.Module) -> str:
    """What to do where transformers' experts run in a way that no ONNX graph can hold; empty elsewhere."""
    configs = [getattr(m, "config", None) for m in model.modules() if hasattr(m, "is_transposed")]
    asked = {str(getattr(config, "_experts_implementation", None)) for config in configs} - {"None", "batched_mm"}
    if not asked:
        return ""
    return f". Its experts run by {sorted(asked)[0]!r}: call model.set_experts_implementation('batched_mm') first"


def fixed_axes(fixed: Sequence[tuple[str, int, str, int]], strict: bool) -> tuple[str, ...]:
    """Notes on the axes that the model fixes; an error where they were asked for."""
    notes = []
    for key, axis, label, size in fixed:
        what = (
            f"the model fixes axis {axis} ({label!r}) of input {key!r} to {size}: it computes with the number, not "
            "with the input's size"
        )
        if strict:
            raise ExportError(f"{what}. Leave the axis out of dynamic_shapes, or change the model")
        notes.append(what)
        if label == "batch" and key != ADAPTER_IDS:
            warnings.warn(f"{what}. The graph takes no other", stacklevel=4)
    return tuple(notes)


def without(axes: Axes, fixed: Sequence[tuple[str, int, str, int]]) -> Axes:
    """The axes that stay dynamic."""
    gone = {(key, axis) for key, axis, _, _ in fixed}
    left = {key: {i: label for i, label in named.items() if (key, i) not in gone} for key, named in axes.items()}
    return {key: named for key, named in left.items() if named}


def translate(program: torch.export.ExportedProgram, opset: int | None) -> Any:
    try:
        with quiet():
            # Unoptimised: the optimizer would fold and merge the very tensors that become inputs.
            made = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=translations(),
            )
    except Exception as error:  # as above
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first text says how to report it to PyTorch, the last what it is
            cause = cause.__cause__
        raise ExportError(f"the model does not translate to ONNX: {_brief(cause)}") from error
    assert made is not None
    got = made.model.opset_imports[""]
    if opset is not None and got != opset:
        raise ExportError(
            f"the graph does not convert to opset {opset}, it stays at {got}: leave opset out, or give {got}"
        )
    return made


def _brief(error: BaseException, lines: int = 12) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: " + "\n".join(text[:lines] + (["..."] if len(text) > lines else []))
