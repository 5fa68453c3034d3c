"""The checks of a graph at its export, which `verify` repeats: against torch, and against what it gave before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ....backends.artifact.parity import Parity, floor_of, hold, noise_of, sizes_of, tolerance_of
from ....backends.artifact.random_inputs import fresh
from ....backends.artifact.signature import Axes, Example, other_sizes
from ....rewriter.errors import ExportError, ParityError
from ....rewriter.method import ADAPTER_IDS
from ...adapterfiles.ort_values import TYPES
from ..modes.export_plan import Plan, Truth
from .ort_graph import CheckGraph, Inputs
from .record import Record

_SAMPLES = 64  # values kept of every output of a probe
_OTHERS = 4  # inputs that tell how far torch itself is from the float64 result, and how large that is
_NO_INTEGERS = "the model takes no random integers: compared with those of the example, in its sizes alone"


def check(
    plan: Plan, graph: CheckGraph, example: Example, axes: Axes, seed: int, tolerance: float | None
) -> tuple[Record, tuple[str, ...]]:
    """The comparisons with torch, on the example and on random inputs of other sizes, as a record; notes.

    A model may run on no random integers at all (the image tokens of LLaVA are as many as the image has): then the
    example's own stand in, in its sizes, with random floats. Raises `ParityError`, or `ExportError` where the model
    does not run in other sizes.
    """
    try:
        return _checked(plan, graph, example, axes, seed, tolerance), ()
    except ParityError:
        raise
    except ExportError:
        _, truth, _ = next(plan.runs(0, example.tensors))
        try:
            truth(Record.of(example, axes).arguments(fresh(example, {}, {}, seed)))
        except ExportError:
            return _checked(plan, graph, example, {}, seed, tolerance, given=True), (_NO_INTEGERS,)
        raise


def _checked(
    plan: Plan,
    graph: CheckGraph,
    example: Example,
    axes: Axes,
    seed: int,
    tolerance: float | None,
    given: bool = False,
) -> Record:
    record = Record.of(example, axes, given)
    draws = [(sizes, seed + step) for step, sizes in enumerate(other_sizes(example, axes) or [{}], start=1)]
    random = [fresh(example, axes, sizes, seed, given) for sizes, seed in draws]
    parity = [*compare(plan, graph, record, "example", example.tensors, 0, tolerance)]
    for step, tensors in enumerate(random):
        parity += compare(plan, graph, record, f"random {step + 1}", tensors, step, tolerance)
    probes = [
        {"sizes": sizes, "seed": seed, **({"ids": feeds[ADAPTER_IDS].tolist()} if feeds else {}), "case": case}
        | {"outputs": probe(graph, case, {**tensors, **feeds})}
        for (sizes, seed), tensors in zip(draws, random, strict=True)
        for case, feeds in plan.probes(tensors)
    ]
    return dataclasses.replace(record, parity=[dataclasses.asdict(one) for one in parity], probes=probes)


def compare(
    plan: Plan, graph: CheckGraph, record: Record, case: str, tensors: Inputs, step: int, tolerance: float | None
) -> Iterator[Parity]:
    """Every run of the plan on these inputs, see `Plan.runs`, held against torch: within `tolerance` of an output's
    largest value where the user gave one, else judged as `parity.hold` does. Raises `ParityError`."""
    for label, truth, feeds in plan.runs(step, tensors):

        def wide(truth: Truth = truth, tensors: Inputs = tensors) -> Mapping[str, np.ndarray] | None:
            try:
                return truth(record.arguments(tensors), torch.float64)
            except ExportError:  # an operator without a float64 kernel, or code that asks for a dtype by name
                return None

        def noise(truth: Truth = truth) -> dict[str, tuple[float, float]]:
            largest: dict[str, tuple[float, float]] = {}
            for others in record.like(tensors, _OTHERS):
                right = wide(truth, others)
                if right is not None:
                    for name, (off, size) in noise_of(truth(record.arguments(others)), right).items():
                        before = largest.get(name, (0.0, 0.0))
                        largest[name] = max(off, before[0]), max(size, before[1])
            return largest

        where, expected = f"{case}, {label}", truth(record.arguments(tensors))
        limit, known = (floor_of(plan.module), wide) if tolerance is None else (tolerance, None)
        got = graph.compute(where, tensors, feeds)
        otherwise = tolerance_of(plan.module)
        yield hold(got, expected, "onnxruntime", where, sizes_of(tensors), limit, known, otherwise, noise)


def probe(graph: CheckGraph, case: str, inputs: Inputs) -> dict[str, Any]:
    """What a graph gives for these inputs, in few numbers, ready for JSON: of every output, by its name in the graph,
    the shape, the largest magnitude and 64 evenly spaced values."""
    given = graph.compute(case, inputs)
    return {graph.graph_outputs.get(name, name): _digest(value) for name, value in given.items()}


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


def random_adapter(graph: CheckGraph, seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    """Random tensors for the adapter inputs of free size, as large as what they are added to; none where every tensor
    is a trained head or a whole weight, whose default is the base's."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, info in graph.adapter_inputs.items():
        if any(isinstance(dim, str) for dim in info.shape):
            shape = [dim if isinstance(dim, int) else rank for dim in info.shape]
            # Small enough for float16: the product with it must not be infinite.
            made[name] = (torch.randn(shape, generator=generator) / shape[0] ** 0.5).to(TYPES[info.type])
    return made
