"""A model's call as a graph has it: tensors in, tensors out, each in its place and under a name of its own.

model(x, features={"ids": ids}, flag=True)  ->  Output(logits=..., loss=None, steps=3)
flat(input_0, input_1)                      ->  (logits,)      outputs: "logits"; not in the graph: steps = 3
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any

import torch

from ....backends.artifact.signature import Axes, Example, arguments, named_tensors

#: torch.export, and the translation to ONNX, keep state of the process: exports take turns.
TURN = threading.RLock()


class FlatCall:
    """Traced in the place of a module: a view of it, with the same tensors under the same names.

    Inputs are called by places that no parameter, adapter tensor or keyword of Python can have; constants and dicts are
    the view's own business. `outputs` and `dropped` say after the tracing what came out, see `named_tensors`.
    """

    def __init__(self, module: torch.nn.Module, example: Example) -> None:
        self.names = {name: f"input_{place}" for place, name in enumerate(example.tensors)}
        self.outputs: list[str] = []
        self.dropped: dict[str, Any] = {}
        self.inputs = {place: example.tensors[name] for name, place in self.names.items()}
        self.module = self._view(module, example)

    def named(self, axes: Axes) -> Axes:
        """Axes by the names of the view's inputs."""
        return {self.names[name]: named for name, named in axes.items()}

    def dims(self, dims: Mapping[str, Any]) -> dict[str, Any]:
        """Dynamic dimensions as `torch.export` takes them, an entry for every input of the view."""
        return {place: dims.get(name) for name, place in self.names.items()}

    def _view(self, module: torch.nn.Module, example: Example) -> torch.nn.Module:
        def forward(_: torch.nn.Module, **given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = {name: given[place] for name, place in self.names.items()}
            # Called, not its forward: a graph module whose forward is generated, and hooks, have their say.
            output = module(**arguments({**values, **example.constants}, example.nested))
            self.dropped.clear()
            found = named_tensors(output, dropped=self.dropped)
            self.outputs[:] = found
            return tuple(found.values())

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in ("self", *self.inputs)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        view = type(type(module).__name__, (torch.nn.Module,), {"forward": forward})()
        view.__dict__.update(module.__dict__)
        return view
