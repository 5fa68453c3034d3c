"""`verify`: is a graph on disk still what was exported, and does it still do what it did?"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...backends.artifact.parity import Parity
from ...backends.artifact.signature import add_up
from ...rewriter.capture.skeleton import bare
from ...rewriter.errors import ExportError, ParityError, SessionError, VerifyError, listing, path_of
from ...rewriter.method import ADAPTER_IDS
from ..adapterfiles import graph_manifest as manifest
from .cached_decoder import cached
from .checks import axes_of, differs, drawn, hold_against_torch, probe, random_adapter, rule_of
from .graph_parity import quiet_session, run
from .modes import make_plan
from .prepare import working_copy
from .seal import RECORD, check_seal


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
    metadata = check_seal(file)
    try:
        told = manifest.load(metadata)
    except SessionError as error:
        raise VerifyError(str(error)) from error
    if told is None or RECORD not in metadata:
        raise VerifyError(
            f"{str(file)!r} was written in another format; this fxgraft reads {manifest.FORMAT}: update it"
        )
    record = json.loads(metadata[RECORD])
    checks = ["every byte is as exported"]
    _check_graph(file)
    checks.append("onnx.checker accepts it")
    try:
        session = quiet_session(file)
    except ExportError as error:
        raise VerifyError(str(error)) from error
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    if not told.get("checked", True):
        checks.append("was exported with check=False: never compared with torch, and there is nothing to repeat")
    if "quantised" in told:
        checks.append(f"was quantised to {told['quantised']['bits']} bits, off by {told['quantised']['error']:.1e}")
    limit = _limit(told, record)
    checks += _again(session, record, limit)
    checks += _unseen(session, record, told, seed, limit)
    parity: list[Parity] = []
    if model is not None:
        parity = _with_torch(model, session, record, told, seed)
        allowed = max((check.allowed for check in parity), default=0.0)
        checks.append(f"agrees with torch on unseen inputs (seed {seed}) within {allowed:.0e}")
    exported = tuple(Parity(**check) for check in record["parity"])
    return Verification(file, tuple(checks), tuple(parity), exported, told, time.perf_counter() - started)


def _limit(told: Mapping[str, Any], record: Mapping[str, Any]) -> float:
    """How far two runs of one graph may be apart, on another machine and version, over an output's largest value: what
    its comparison with torch was allowed at most."""
    if "quantised" in told:
        return float(told["quantised"]["tolerance"])
    return max([told["tolerance"], *(check.get("allowed", 0.0) for check in record["parity"])])


def _check_graph(file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise VerifyError(f"onnx.checker refuses {str(file)!r}: {error}") from error


def _outputs(session: Any) -> list[str]:
    return [value.name for value in session.get_outputs()]


def _again(session: Any, record: Mapping[str, Any], tolerance: float) -> list[str]:
    """The outputs of the export, for the inputs of the export."""
    if not record["probes"]:
        return []
    for stored in record["probes"]:
        inputs = drawn(record, stored["sizes"], stored["seed"])
        if "ids" in stored:
            inputs[ADAPTER_IDS] = torch.tensor(stored["ids"], dtype=torch.int64)
        wrong = differs(_run(session, stored["case"], inputs, probe), stored["outputs"], tolerance)
        if wrong:
            raise VerifyError(f"the graph no longer gives what it gave at the export ({stored['case']}): {wrong}")
    return [f"gives what it gave at the export ({len(record['probes'])} runs)"]


def _run(session: Any, case: str, inputs: Mapping[str, torch.Tensor], function: Any) -> Any:
    try:
        return function(session, inputs, _outputs(session))
    except Exception as error:  # onnxruntime's classes share no base
        raise VerifyError(f"onnxruntime fails on the graph ({case}): {error}") from error


def _sizes(record: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Sizes for the dynamic axes that the export did not use: batches larger than any, sequences not longer."""
    axes = axes_of(record)
    seen: dict[str, int] = {}
    for name, named in axes.items():
        seen.update({label: record["inputs"][name]["shape"][axis] for axis, label in named.items()})
    yield add_up({label: size + 3 if "batch" in label else max(size - 2, 1) for label, size in seen.items()})
    yield add_up({label: 1 if "batch" in label else size for label, size in seen.items()})


def _unseen(session: Any, record: Mapping[str, Any], told: Mapping[str, Any], seed: int, tolerance: float) -> list[str]:
    shapes = {value.name: value.shape for value in session.get_outputs()}
    done = [f"runs on unseen inputs (seed {seed})"]
    for step, sizes in enumerate(_sizes(record)):
        inputs = drawn(record, sizes, seed + step)
        batch = next(iter(inputs.values())).shape[0] if inputs else 0
        slots = sorted(told.get("tenants", {}).values())
        if told["adapters"] == "bank":
            inputs[ADAPTER_IDS] = torch.tensor([[*slots, 0][i % (len(slots) + 1)] for i in range(batch)])
        case = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
        got = _run(session, case, inputs, run)
        for name, value in got.items():
            wanted = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shapes[name]]
            if any(isinstance(w, int) and w != n for w, n in zip(wanted, value.shape, strict=True)):
                raise VerifyError(f"output {name!r} is {value.shape} and was promised as {shapes[name]} ({case})")
            if value.dtype.kind == "f" and np.isnan(value).any():
                raise VerifyError(f"output {name!r} is NaN ({case})")
        if told["adapters"] == "bank":
            _rows(session, inputs, got, tolerance, case)
            done[1:] = ["gives every row of a mixed batch what the row's adapter gives alone"]
        elif told["adapters"] == "swappable" and _adapters(session, inputs, got, seed + step, case):
            done[1:] = ["an adapter of zeros is no adapter, bit for bit, and a random one is not"]
    return done


def _rows(
    session: Any, inputs: dict[str, torch.Tensor], got: Mapping[str, np.ndarray], tolerance: float, case: str
) -> None:
    ids = inputs[ADAPTER_IDS]
    for slot in ids.unique().tolist():
        alone = _run(session, case, {**inputs, ADAPTER_IDS: torch.full_like(ids, slot)}, run)
        for name, value in alone.items():
            rows = np.repeat((ids == slot).numpy(), len(value) // len(ids))
            if not np.allclose(got[name][rows], value[rows], rtol=0, atol=tolerance * (np.abs(value).max() or 1.0)):
                raise VerifyError(f"output {name!r} of slot {slot} is another one in a mixed batch ({case})")


def _adapters(
    session: Any,
    inputs: Mapping[str, torch.Tensor],
    got: Mapping[str, np.ndarray],
    seed: int,
    case: str,
) -> bool:
    """Zeros of some rank, then random numbers, in the place of the tensors of free size; False where there are none."""
    random = random_adapter(session, seed)
    # B is the right factor of a site's product.
    zeros = {name: torch.zeros_like(t) if name.rpartition(".")[2] == "B" else t for name, t in random.items()}
    if not random:
        return False
    same, other = (_run(session, case, {**inputs, **adapter}, run) for adapter in (zeros, random))
    for name, value in got.items():
        if not np.array_equal(same[name], value, equal_nan=True):
            raise VerifyError(f"output {name!r} changes with an adapter whose right factors are zero ({case})")
    if all(np.array_equal(other[name], value) for name, value in got.items()):
        raise VerifyError(f"a random adapter changes no output ({case}): the graph does not use its adapter inputs")
    return True


def _with_torch(
    model: torch.nn.Module, session: Any, record: Mapping[str, Any], told: Mapping[str, Any], seed: int
) -> list[Parity]:
    if not isinstance(model, torch.nn.Module):
        raise VerifyError(f"verify(path, {type(model).__name__}): give the adapted model, an nn.Module")
    root = working_copy(bare(model))
    if told.get("cache"):
        root = cached(root, told["cache"])
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
        cases = []
        for step, sizes in enumerate(_sizes(record)):
            inputs = {name: tensor.to(device) for name, tensor in drawn(record, sizes, seed + step).items()}
            cases.append((f"unseen {step + 1}", inputs, step))
        try:
            given = told["quantised"]["tolerance"] if "quantised" in told else told.get("given_tolerance")
            rule = rule_of(plan, given)
            return hold_against_torch(plan, session, cases, record["constants"], record.get("nested", {}), rule)
        except ParityError as error:
            raise VerifyError(f"the graph is not the model's: {error}") from error


__all__ = ["Verification", "verify"]
