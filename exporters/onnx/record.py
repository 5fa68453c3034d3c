"""Running a new graph against torch, and what is kept of it in the file for `verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...backends.artifact.parity import Parity
from ...backends.artifact.random_inputs import describe_inputs, fresh
from ...backends.artifact.signature import Axes, Example, arguments, other_sizes
from ...rewriter.errors import ExportError, ParityError
from ...rewriter.method import ADAPTER_IDS
from .checks import Inputs, Rule, hold_against_torch, probe
from .graph_parity import quiet_session
from .modes import Plan, Truth


def record_of(example: Example, axes: Axes, given: bool = False) -> dict[str, Any]:
    """What `verify` needs to draw inputs for a graph."""
    return {
        "parity": [],
        "inputs": describe_inputs(example, given),
        "constants": example.constants,
        "nested": example.nested,
        "axes": axes,
        "probes": [],
    }


def checked(
    plan: Plan, file: Path, example: Example, axes: Axes, seed: int, rule: Rule
) -> tuple[list[Parity], dict[str, Any], tuple[str, ...]]:
    """The comparisons with torch, on the example and on random inputs of other sizes; the record of them; notes.

    A model may run on no random integers at all (the image tokens of LLaVA are as many as the image has): then the
    example's own stand in, in its sizes, with random floats. Raises `ParityError`, or `ExportError` where the model
    does not run in other sizes.
    """
    session = quiet_session(file)
    given, notes = False, list[str]()
    cases, draws = _cases(example, axes, seed, given)
    try:
        parity = hold_against_torch(plan, session, cases, example.constants, example.nested, rule)
    except ParityError:
        raise
    except ExportError:
        if _takes(plan, example, fresh(example, {}, {}, seed)):
            raise
        given, axes = True, {}
        notes.append("the model takes no random integers: compared with those of the example, in its sizes alone")
        cases, draws = _cases(example, axes, seed, given)
        parity = hold_against_torch(plan, session, cases, example.constants, example.nested, rule)
    names = [value.name for value in session.get_outputs()]
    probes = []
    for one in draws:
        tensors = fresh(example, axes, one["sizes"], one["seed"], given)
        for case, feeds in plan.probes(tensors):
            ids = {"ids": feeds[ADAPTER_IDS].tolist()} if feeds else {}
            probes.append({**one, **ids, "case": case, "outputs": probe(session, {**tensors, **feeds}, names)})
    made = {"parity": [dataclasses.asdict(check) for check in parity], "probes": probes}
    return parity, {**record_of(example, axes, given), **made}, tuple(notes)


def _takes(plan: Plan, example: Example, tensors: Inputs) -> bool:
    for _, truth, _ in plan.runs(0, tensors):
        return _runs(truth, arguments({**tensors, **example.constants}, example.nested))
    return True


def _runs(truth: Truth, inputs: Mapping[str, Any]) -> bool:
    try:
        truth(inputs)
    except ExportError:
        return False
    return True


def _cases(
    example: Example, axes: Axes, seed: int, given: bool
) -> tuple[Sequence[tuple[str, Inputs, int]], list[dict[str, Any]]]:
    """What is compared: the example, and random inputs of other sizes; and those once more as (sizes, seed)."""
    cases: list[tuple[str, Inputs, int]] = [("example", example.tensors, 0)]
    draws = []
    for step, sizes in enumerate(other_sizes(example, axes) or [{}], start=1):
        cases.append((f"random {step}", fresh(example, axes, sizes, seed + step, given), step - 1))
        draws.append({"sizes": sizes, "seed": seed + step})
    return cases, draws
