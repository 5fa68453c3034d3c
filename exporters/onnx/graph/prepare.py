"""A model made ready for an export: a copy that may be traced and run, and an example that it runs on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ....backends.artifact.signature import Example, arguments, named_tensors
from ....passes.models.dequantise import dequantised
from ....rewriter.adapter_tensors import Container
from ....rewriter.capture.skeleton import copy_skeleton
from ....rewriter.errors import ExportError, listing

# Larger buffers are quantised weights, which no forward writes.
_WRITTEN = 1 << 26


def working_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in eval mode to trace and run: over the same weights, with buffers of its own, which a forward may write.

    Quantised layers are plain ones there: what their packages do is nothing a graph could hold.
    Whoever uses the model meanwhile sees no other mode, and no parameter in the middle of a tracing.
    """
    twin = dequantised(copy_skeleton(model))
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id, so the first of a pair must stay alive
    for module in twin.modules():
        if isinstance(module, Container):
            continue
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.nbytes <= _WRITTEN and type(buffer) is torch.Tensor:
                own.setdefault(id(buffer), (buffer, buffer.detach().clone()))
                module._buffers[key] = own[id(buffer)][1]
    for module in twin.modules():  # exported graphs refuse .eval()
        module.training = False
    return twin


def runnable(module: torch.nn.Module, example: Example) -> Example:
    """The example, after running the model on it; with `use_cache=False` where the model gives a cache unasked.

    Raises `ExportError` where the model does not run, or keeps something from one run to the next.
    """
    before = _tensors(module)
    output = _run(module, example)
    if _written(module, before):  # once is a table that is made when it is first needed
        before = _tensors(module)
        output = _run(module, example)
        if written := _written(module, before):
            raise ExportError(
                f"the forward writes {listing(written)} at every run: a graph keeps nothing from one run to the next. "
                "Make it leave them alone in eval mode, or take and give them as inputs and outputs"
            )
    try:
        named_tensors(output, dropped={})
    except ExportError:
        if "use_cache" in example.constants:
            raise
        without = dataclasses.replace(example, constants={**example.constants, "use_cache": False})
        if not _gives_tensors(module, without):
            raise
        return without
    return example


def _gives_tensors(module: torch.nn.Module, example: Example) -> bool:
    try:
        return bool(named_tensors(_run(module, example), dropped={}))
    except ExportError:
        return False


def _tensors(module: torch.nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """A model's tensors, and how often each has been written."""
    return {name: (value, value._version) for name, value in [*module.named_buffers(), *module.named_parameters()]}


def _written(module: torch.nn.Module, before: dict[str, tuple[torch.Tensor, int]]) -> list[str]:
    """The tensors that were written since, or that others of other values have taken the place of."""
    found = []
    for name, (value, version) in _tensors(module).items():
        was = before.get(name)
        if (
            was is None
            or (was[0] is value and was[1] != version)
            or (was[0] is not value and (was[0].shape != value.shape or not torch.equal(was[0], value)))
        ):
            found.append(name)
    return found


def _run(module: torch.nn.Module, example: Example) -> Any:
    try:
        return module(**arguments(example.kwargs, example.nested))
    except Exception as error:  # whatever the model raises on unfit inputs is the caller's to read
        raise ExportError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error
