"""The comparisons a graph is put through: at export, and again by `verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...backends.artifact.parity import Parity, floor_of, tolerance_of
from ...backends.artifact.random_inputs import draw
from ...backends.artifact.signature import Axes, arguments
from ...rewriter.errors import ExportError
from ..adapterfiles.ort_values import TYPES
from .graph_parity import compare, run
from .modes import Plan, Truth

Inputs = Mapping[str, torch.Tensor]
_SAMPLES = 64  # values kept of every output of a probe


@dataclass(frozen=True)
class Rule:
    """How far a graph may be from torch: `given` of an output's largest value, where the user said so; else see
    `backends.parity.hold`, with the floor and what holds where there is no float64 result."""

    given: float | None
    floor: float
    otherwise: float


def rule_of(plan: Plan, given: float | None) -> Rule:
    return Rule(given, floor_of(plan.module), tolerance_of(plan.module) if given is None else given)


def hold_against_torch(
    plan: Plan,
    session: Any,
    cases: Sequence[tuple[str, Inputs, int]],
    constants: Mapping[str, Any],
    nested: Mapping[str, Mapping[str, str]],
    rule: Rule,
) -> list[Parity]:
    """Every run of the plan on every case: (label, inputs, step), see `Plan.runs`. Raises `ParityError`."""
    checks = []
    for label, tensors, step in cases:
        for case, truth, feeds in plan.runs(step, tensors):

            def given(values: Inputs = tensors) -> dict[str, Any]:
                return arguments({**values, **constants}, nested)

            def wide(truth: Truth = truth, given: Any = given) -> Mapping[str, np.ndarray] | None:
                try:
                    return truth(given(), torch.float64)
                except ExportError:  # an operator without a float64 kernel, or code that asks for a dtype by name
                    return None

            expected = truth(given())
            if rule.given is None:
                checks.append(
                    compare(session, f"{label}, {case}", tensors, expected, rule.floor, feeds, wide, rule.otherwise)
                )
            else:
                checks.append(compare(session, f"{label}, {case}", tensors, expected, rule.given, feeds))
    return checks


def probe(session: Any, inputs: Inputs, names: Sequence[str]) -> dict[str, Any]:
    """What a graph gives for these inputs, in few numbers, ready for JSON: of every output the shape, the largest
    magnitude and 64 evenly spaced values."""
    return {name: _digest(value) for name, value in run(session, inputs, names).items()}


def _digest(value: np.ndarray) -> dict[str, Any]:
    flat = value.astype(np.float64).reshape(-1)
    finite = np.abs(flat[np.isfinite(flat)])
    places = np.linspace(0, max(flat.size - 1, 0), min(_SAMPLES, flat.size)).astype(np.int64)
    return {"shape": list(value.shape), "largest": float(finite.max(initial=0.0)), "values": flat[places].tolist()}


def differs(got: Mapping[str, Any], want: Mapping[str, Any], tolerance: float) -> str | None:
    """What is different between two probes, None where nothing is but rounding."""
    for name, one in want.items():
        other = got[name]
        if other["shape"] != one["shape"]:
            return f"output {name!r} is {other['shape']} and was {one['shape']}"
        now, then = np.array(other["values"]), np.array(one["values"])
        scale = one["largest"] or 1.0
        finite = np.isfinite(then)
        if not np.array_equal(np.isfinite(now), finite):
            return f"output {name!r} is finite in other places"
        difference = float(np.abs(now[finite] - then[finite]).max(initial=0.0))
        if difference > tolerance * scale:
            return f"output {name!r} differs by {difference / scale:.3g} of its largest value, allowed {tolerance:.3g}"
    return None


def random_adapter(session: Any, seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    """Random tensors for the adapter inputs of free size, as large as what they are added to; none where every tensor
    is a trained head or a whole weight, whose default is the base's."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for value in session.get_overridable_initializers():
        if any(isinstance(dim, str) for dim in value.shape):
            shape = [rank if isinstance(dim, str) else dim for dim in value.shape]
            # Small enough for float16: the product with it must not be infinite.
            made[value.name] = (torch.randn(shape, generator=generator) / shape[0] ** 0.5).to(TYPES[value.type])
    return made


def drawn(record: Mapping[str, Any], sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Random inputs from what a record says of them."""
    return draw(record["inputs"], axes_of(record), sizes, seed)


def axes_of(record: Mapping[str, Any]) -> Axes:
    """The dynamic axes of a record: JSON has strings for keys."""
    return {name: {int(axis): label for axis, label in named.items()} for name, named in record["axes"].items()}
