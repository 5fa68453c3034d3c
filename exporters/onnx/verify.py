"""`verify`: is a graph on disk still what was exported, and does it still do what it did?"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.artifact.parity import Parity, sizes_of
from ...rewriter.capture.skeleton import bare
from ...rewriter.errors import ExportError, ParityError, VerifyError, listing, path_of
from ...rewriter.method import ADAPTER_IDS
from ..adapterfiles.adapter_inputs import right_factors
from .cache.cache_plan import CachePlan
from .cache.cached_decoder import cached
from .checks.checks import compare, differs, probe, random_adapter
from .checks.ort_graph import CheckGraph, Inputs
from .checks.record import Record, read_description
from .graph.prepare import working_copy
from .modes.modes import make_plan


@dataclass(frozen=True)
class Verification:
    """What was checked, every check passed.

    `checks` says it in words; `parity` holds the comparisons with torch, where a model was given; `exported` those that
    were made at the export, and `manifest` what the graph says of itself: mode, configs, versions, tolerance.
    """

    path: Path
    checks: tuple[str, ...]
    parity: tuple[Parity, ...]
    exported: tuple[Parity, ...]
    manifest: dict[str, Any]
    seconds: float

    def __str__(self) -> str:
        mode, versions = self.manifest["adapters"], self.manifest["versions"]
        lines = [f"{self.path}: {mode}, exported with torch {versions['torch']}, {self.seconds:.1f} s"]
        lines += [f"  {check}" for check in self.checks]
        lines += [f"  {check.case:<32} {check.relative:8.1e} of the largest value" for check in self.parity]
        return "\n".join(lines)


def verify(
    path: str | os.PathLike[str], model: torch.nn.Module | None = None, *, seed: int | None = None
) -> Verification:
    """Repeat what `export_onnx` checked of a graph; every failure is a `VerifyError`, and no file is changed.

    Without the model: the hashes of the graph and of its weight files, `onnx.checker`, the outputs of the export for
    its own random inputs (drawn anew from their seed, compared within the export's tolerance), and that the graph runs
    on inputs nobody has seen, at other sizes, and gives numbers of the promised shapes. Swappable graphs are also run
    with an adapter whose right factors are zero, which must be no adapter bit for bit, and with a random one, which
    must not. Banks are run with mixed batches, which must be their rows run alone.

    Args:
        path: of the graph.
        model: the adapted model it was exported from; then the comparison with torch is repeated on unseen inputs.
        seed: of the unseen inputs; None draws one.
    """
    started = time.perf_counter()
    file = path_of(path, "verify", VerifyError)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise VerifyError(f"verify(seed={seed!r}): give a whole number, or None")
    told, record = read_description(file)
    checks = ["every byte is as exported"]
    _check_graph(file)
    checks.append("onnx.checker accepts it")
    if not told.get("checked", True):
        checks.append("was exported with check=False: never compared with torch, and there is nothing to repeat")
    quantised = told.get("quantised", {})
    if quantised:
        checks.append(f"was quantised to {quantised['bits']} bits, off by {quantised['error']:.1e}")
    # How far two runs of one graph may be apart, on another machine and version: what its comparison with torch was
    # allowed at most.
    limit = max([told["tolerance"], *(check.get("allowed", 0.0) for check in record.parity)])
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    parity: list[Parity] = []
    try:
        graph = CheckGraph(file, told)
        checks += _again(graph, record, quantised.get("tolerance", limit))
        checks += _unseen(graph, record, seed, quantised.get("tolerance", limit))
        if model is not None:
            tolerance = quantised.get("tolerance", told.get("given_tolerance"))
            parity = _with_torch(model, graph, record, seed, tolerance)
            allowed = max((check.allowed for check in parity), default=0.0)
            checks.append(f"agrees with torch on unseen inputs (seed {seed}) within {allowed:.0e}")
    except ExportError as error:
        raise VerifyError(str(error)) from error
    exported = tuple(Parity(**check) for check in record.parity)
    return Verification(file, tuple(checks), tuple(parity), exported, told, time.perf_counter() - started)


def _check_graph(file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise VerifyError(f"onnx.checker refuses {str(file)!r}: {error}") from error


def _again(graph: CheckGraph, record: Record, tolerance: float) -> list[str]:
    """The outputs of the export, for the inputs of the export."""
    for stored in record.probes:
        inputs, case = record.draw(stored["sizes"], stored["seed"]), stored["case"]
        if "ids" in stored:
            inputs[ADAPTER_IDS] = torch.tensor(stored["ids"], dtype=torch.int64)
        if wrong := differs(probe(graph, case, inputs), stored["outputs"], tolerance):
            raise VerifyError(f"the graph no longer gives what it gave at the export ({case}): {wrong}")
    return [f"gives what it gave at the export ({len(record.probes)} runs)"] if record.probes else []


def _unseen(graph: CheckGraph, record: Record, seed: int, tolerance: float) -> list[str]:
    told = graph.manifest or {}
    slots = [*sorted(told.get("tenants", {}).values()), 0]
    done = [f"runs on unseen inputs (seed {seed})"]
    for step, sizes in enumerate(record.unseen_sizes()):
        inputs = record.draw(sizes, seed + step)
        if told["adapters"] == "bank":
            batch = next(iter(inputs.values())).shape[0]
            inputs[ADAPTER_IDS] = torch.tensor([slots[i % len(slots)] for i in range(batch)])
        case = sizes_of(inputs)
        got = graph.compute("unseen", inputs)
        for name, value in got.items():
            shape = graph.outputs[name].shape
            wanted = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape]
            if any(isinstance(w, int) and w != n for w, n in zip(wanted, value.shape, strict=True)):
                raise VerifyError(f"output {name!r} is {value.shape} and was promised as {list(shape)} ({case})")
            if value.dtype.kind == "f" and np.isnan(value).any():
                raise VerifyError(f"output {name!r} is NaN ({case})")
        if told["adapters"] == "bank":
            _rows(graph, inputs, got, tolerance, case)
            done[1:] = ["gives every row of a mixed batch what the row's adapter gives alone"]
        elif told["adapters"] == "swappable" and (adapter := random_adapter(graph, seed + step)):
            _adapters(graph, inputs, got, adapter, case)
            done[1:] = ["an adapter of zeros is no adapter, bit for bit, and a random one is not"]
    return done


def _rows(graph: CheckGraph, inputs: Inputs, got: Mapping[str, np.ndarray], tolerance: float, case: str) -> None:
    ids = inputs[ADAPTER_IDS]
    for slot in ids.unique().tolist():
        alone = graph.compute(f"slot {slot}", {**inputs, ADAPTER_IDS: torch.full_like(ids, slot)})
        for name, value in alone.items():
            rows = np.repeat((ids == slot).numpy(), len(value) // len(ids))
            if not np.allclose(got[name][rows], value[rows], rtol=0, atol=tolerance * (np.abs(value).max() or 1.0)):
                raise VerifyError(f"output {name!r} of slot {slot} is another one in a mixed batch ({case})")


def _adapters(graph: CheckGraph, inputs: Inputs, got: Mapping[str, np.ndarray], random: Inputs, case: str) -> None:
    """With a zero right factor at every site a random adapter is none; as it is, it is one."""
    right = right_factors({name: info.shape for name, info in graph.adapter_inputs.items()})
    zero = {name: torch.zeros_like(tensor) if name in right else tensor for name, tensor in random.items()}
    for name, value in graph.compute("an adapter of zeros", inputs, zero).items():
        if not np.array_equal(value, got[name], equal_nan=True):
            raise VerifyError(f"output {name!r} changes with an adapter whose right factors are zero ({case})")
    other = graph.compute("a random adapter", inputs, random)
    if all(np.array_equal(other[name], value) for name, value in got.items()):
        raise VerifyError(f"a random adapter changes no output ({case}): the graph does not use its adapter inputs")


def _with_torch(
    model: torch.nn.Module, graph: CheckGraph, record: Record, seed: int, tolerance: float | None
) -> list[Parity]:
    if not isinstance(model, torch.nn.Module):
        raise VerifyError(f"verify(path, {type(model).__name__}): give the adapted model, an nn.Module")
    told = graph.manifest or {}
    root = working_copy(bare(model))
    if told.get("cache"):
        root = cached(root, CachePlan.told(told["cache"]))
    with torch.no_grad():
        plan = make_plan(root, told["adapters"], told["name"], "own" not in told, None, None)
        if plan.fingerprint != told["fingerprint"]:
            raise VerifyError(
                "the graph was exported from a model with other base weights or sites than the one given: "
                f"{listing(told['sites'])} there, {listing(plan.sites)} here"
            )
        tenants = told.get("tenants")
        if tenants is not None and tenants != plan.about()["tenants"]:
            raise VerifyError(f"the graph has the tenants {tenants}, the model {plan.about()['tenants']}")
        device = next(root.parameters()).device
        parity: list[Parity] = []
        for step, sizes in enumerate(record.unseen_sizes()):
            inputs = {name: tensor.to(device) for name, tensor in record.draw(sizes, seed + step).items()}
            try:
                parity += compare(plan, graph, record, f"unseen {step + 1}", inputs, step, tolerance)
            except ParityError as error:
                raise VerifyError(f"the graph is not the model's: {error}") from error
    return parity


__all__ = ["Verification", "verify"]
