"""From a plan to its graph: traced, translated, with its inputs opened and everything in it named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....backends.artifact.signature import Axes, Example, symbols
from ....rewriter.method import ADAPTER_IDS
from ..export_result import Shape
from ..modes.modes import Plan
from .flat_call import FlatCall
from .graph_names import name_axes, name_ends, rename_axes, tidy
from .graph_rewrites import name_transposes, widen_convolutions
from .open_inputs import Opened, close, unpin
from .translate import fixed_axes, quiet, trace, translate, without
from .weight_files import base_forms
from .widen import has_bfloat16


@dataclass
class Made:
    """A graph of onnx_ir, and what is known of it.

    `axes` are those that stayed dynamic, `opened` the adapter inputs, `renamed` the ends that are not called as the
    model calls them, by side; `forms` the base model's tensors as the graph has them, for `weight_files`.
    """

    model: Any
    axes: Axes
    opened: dict[str, Opened]
    renamed: dict[str, dict[str, str]]
    forms: dict[str, torch.Tensor]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.inputs = self._shapes((value for value in graph.inputs if value.name not in self.opened), "inputs")
        self.outputs = self._shapes(graph.outputs, "outputs")
        self.opset: int = self.model.opset_imports[""]
        self.narrow = has_bfloat16(self.model)

    @property
    def dynamic_axes(self) -> Axes:
        named = {
            name: {i: dim for i, dim in enumerate(dims) if isinstance(dim, str)} for name, dims in self.inputs.items()
        }
        return {name: axes for name, axes in named.items() if axes}

    def _shapes(self, values: Any, side: str) -> dict[str, Shape]:
        """By the model's names."""
        models = {its: name for name, its in self.renamed.get(side, {}).items()}
        return {
            models.get(one.name, one.name): tuple(dim if isinstance(dim, int) else str(dim.value) for dim in one.shape)
            for one in values
        }


def make_graph(
    plan: Plan,
    example: Example,
    axes: Axes,
    dims: Mapping[str, Any],
    opset: int | None,
    strict: bool,
    given: Axes | None = None,
) -> Made:
    """Trace the plan's module on the example and make a graph of it, in this order:

    1. translated as it is, unoptimised: every tensor is still an initializer of its own
    2. the plan opens its inputs, and what must not be folded is kept from the optimizer
    3. onnxscript's optimizer
    4. opened inputs get their defaults back, ends and nodes their names

    `strict`: an axis that the model fixes is an error. `given` are names of axes of outputs. Raises `ExportError`.
    """
    call = FlatCall(plan.module, example)
    program = trace(call, dims)
    names, fixed = symbols(program.graph, call.named(axes))
    places = {place: key for key, place in call.names.items()}
    fixed = [(places[key], axis, label, size) for key, axis, label, size in fixed]
    notes = fixed_axes(fixed, strict)
    made = translate(program, opset)
    del program
    model = made.model
    rename_axes(model, names)
    forms = base_forms(model, plan.base.state_dict())
    opened = plan.open(
        model, next((one for one in model.graph.inputs if one.name == call.names.get(ADAPTER_IDS)), None)
    )
    widen_convolutions(model)
    kept = name_transposes(model)
    with quiet():
        made.optimize()
    model = made.model
    unpin(model, kept)
    close(model, opened)
    plan.close(model)
    renamed = name_ends(model, places, call.outputs, opened)
    name_axes(model, given or {}, renamed.get("outputs", {}))
    tidy(model)
    notes += tuple(
        f"output {key!r} is the {type(value).__name__} {value!r}, no tensor: it is not in the graph"
        for key, value in call.dropped.items()
    )
    return Made(model, without(axes, fixed), opened, renamed, forms, notes)
