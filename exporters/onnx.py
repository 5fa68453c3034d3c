"""`export_onnx`: an adapted model as one ONNX graph, checked against torch before it reaches its place."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..backends.parity import Parity, tolerance_of
from ..backends.staging import staged
from ..rewriter.draws import describe_inputs, fresh
from ..rewriter.errors import listing
from ..rewriter.inputs import OWN_CLASS
from ..rewriter.method import ADAPTER_IDS
from ..rewriter.signature import (
    Axes,
    Example,
    automatic_axes,
    bind,
    check_sizes,
    given_axes,
    named_tensors,
    other_sizes,
    symbols,
)
from ..rewriter.skeleton import bare
from ..rewriter.state import find_state
from . import graph, manifest
from .checks import Inputs, hold_against_torch, probe
from .decoder import cached, cached_example
from .errors import ExportError
from .parity import quiet_session
from .plans import Plan, make_plan
from .seal import seal
from .weights import base_forms, link
from .widen import has_bfloat16

Shape = tuple[int | str, ...]
MODES = ("merged", "swappable", "bank")


@dataclass(frozen=True)
class OnnxExport:
    """What was written, and how close it is to torch.

    `inputs`, `outputs` and `adapter_inputs` map names to shapes, with a string for every free dimension; `dynamic_axes`
    maps input names to {axis: name}. `adapter_inputs` may be left out at run: without them the graph is the base model.
    `parity` holds the comparisons made, all within `tolerance` (largest difference over an output's largest value).
    """

    path: Path
    adapters: str
    name: str | None
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    dynamic_axes: Axes
    adapter_inputs: dict[str, Shape]
    opset: int
    parity: tuple[Parity, ...]
    tolerance: float
    files: dict[str, int]
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Size of the graph and its external data."""
        return sum(self.files.values())

    def __str__(self) -> str:
        def shapes(values: Mapping[str, Shape]) -> str:
            return ", ".join(f"{name} ({' x '.join(map(str, shape)) or 'scalar'})" for name, shape in values.items())

        lines = [
            f"{self.path}: {self.adapters}, opset {self.opset}, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s",
            f"  inputs   {shapes(self.inputs)}",
            f"  outputs  {shapes(self.outputs)}",
        ]
        if self.adapter_inputs:
            sites = {name.rpartition(".")[0] for name, shape in self.adapter_inputs.items() if _rank_free(name, shape)}
            rest = sum(not _rank_free(name, shape) for name, shape in self.adapter_inputs.items())
            forms = sorted({name.rpartition(".")[2] for name, s in self.adapter_inputs.items() if _rank_free(name, s)})
            said = [f"{len(sites)} sites ({', '.join(forms)} of any rank)"] if sites else []
            said += [f"{rest} trained tensors"] if rest else []
            lines.append(f"  adapter  {', '.join(said)}")
        lines.append(f"  parity   tolerance {self.tolerance:.0e} of each output's largest value")
        lines += [
            f"    {check.case:<32} {check.relative:8.1e}  (absolute {check.absolute:.1e})  {check.sizes}"
            for check in self.parity
        ]
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def export_onnx(
    adapted: torch.nn.Module,
    path: str | Path,
    example_inputs: Any,
    adapters: Literal["merged", "swappable", "bank"] = "merged",
    dynamic_shapes: Any = None,
    opset: int | None = None,
    name: str | None = None,
    *,
    cache: bool = False,
    expanded: bool = True,
    capacity: int | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    external_data: bool | None = None,
    seed: int = 0,
) -> OnnxExport:
    """Write `adapted` to `path` (`*.onnx`) and return what was written.

    adapters        "merged": the adapters folded into the weights, a plain graph.
                    "swappable": the base model with free inputs for one adapter, see below; left out, the graph is the
                    base. `export_ort_adapter` writes adapters of any size for it, `OrtSession` runs them.
                    "bank": the base model with slots for many adapters, and an input `adapter_ids (batch,)` int64 that
                    chooses one for every sample. Slot 0 is the base model. `adapted` is what `fg.bank` gives, or a
                    model whose adapters all become tenants; `OrtSession` fills further slots, by name.
    example_inputs  a tuple of positional or a mapping of keyword arguments; tensors become inputs under their
                    parameter names, None, bool, int, float and str become constants.
    dynamic_shapes  {input: {axis: name or torch.export.Dim}}; None makes the batch axis, and the sequence axis of
                    integer and mask inputs, dynamic; {} fixes every axis. A dynamic axis is at least 2 in the example.
    opset           ONNX opset; None is the exporter's default.
    name            which adapter; None is the active one ("merged": all active ones).
    cache           of a causal language model: the graph takes the keys and values of the tokens so far and gives them
                    with the new ones added, for generation (`OrtSession.generate`). The example needs `input_ids`
                    alone; inputs and outputs are those of `exporters.decoder.cached`, an `attention_mask` among them.
    expanded        "swappable": False makes the method's own tensors the inputs, under the names of their checkpoint
                    (Uni-LoRA: the one vector `theta`), all zero by default, and the graph does the method's arithmetic
                    at every run. Only adapters of the same config fit, written with
                    `export_ort_adapter(expanded=False)`. Smaller in memory, and for GLoRA on disk, and slower.
    capacity, rank  "bank": how many tenants, and of which rank, a session makes room for; by default those of the bank.
                    The file holds the tenants it was given and no empty slots, and a session may choose otherwise.
    tolerance       largest allowed difference from torch over the largest value of an output; None picks by dtype
                    (float32 5e-5).
    external_data   weights in files beside the graph, `<sha256>.weights`; None does so beyond 1.5 GB. All graphs of one
                    base model in one folder share the file with its weights; what a graph has besides (merged sites)
                    is in a second one. They stay when a graph is written anew: others may read them.

    Inputs for one adapter, by method; all are left out, or all are given:
    LoRA, LoRA-XS, LoRA-SB, Uni-LoRA, PRoLoRA   `<site>.A (in, rank)`, `<site>.B (rank, out)`: one graph for all five
    HydraLoRA       `<site>.A (in, rank)`, `<site>.router (in, experts)`, `<site>.B (experts, rank, out)`
    GLoRA           the merged `<weight>` and `<bias>` of every site in whole, by their names in the base model: fed by
                    name they take the place of the base's. No small tensors will do, as the method scales the base
                    weight elementwise. Left out they are the base's bit for bit, but onnxruntime packs constant
                    weights and not those that can be fed, and sums in another order: 4e-7 at 768 features.
    trained heads   their tensors, by their names in the base model
    In a bank the low-rank methods and HydraLoRA have the same names with a first dimension of slots, and heads are
    `<name>.delta`, differences to the base. HydraLoRA banks have one number of experts. GLoRA has no bank: every slot
    would hold, and every sample gather, whole weights.

    A model without adapters is exported as it is ("merged"), a baseline to compare with. The graph is run in
    onnxruntime against torch, on the example and on fresh random inputs of other sizes, before it is moved into place.
    A bfloat16 graph is for GPUs; graph and model are compared computing in float32 with their bfloat16 weights.
    The model is exported in eval mode and left as it was. Raises `ExportError` (`ParityError` where the numbers
    differ); nothing is written then, and a file that was at `path` stays.
    """
    started = time.perf_counter()
    if not isinstance(adapted, torch.nn.Module):
        raise ExportError(f"export_onnx({type(adapted).__name__}, ...): give the adapted model, an nn.Module")
    adapted = bare(adapted)
    if adapters not in MODES:
        raise ExportError(f"adapters={adapters!r} is not one of {listing(MODES)}")
    if not expanded and adapters != "swappable":
        raise ExportError(f"expanded=False is for adapters='swappable', not for {adapters!r}")
    if adapters != "bank" and (capacity is not None or rank is not None):
        raise ExportError(f"capacity= and rank= are for a bank of adapters (adapters='bank'), not for {adapters!r}")
    layers = 0
    if cache:
        if dynamic_shapes is not None:
            raise ExportError(
                "cache=True makes every axis of the cache and the tokens dynamic; leave dynamic_shapes out"
            )
        with eval_mode(adapted):
            decoder = cached_example(adapted, example_inputs)
        adapted, example_inputs, layers = cached(adapted, decoder.layers), decoder.inputs, decoder.layers
    example = bind(adapted, example_inputs)
    if cache:
        axes = decoder.axes
        dims: dict[str, Any] = {key: dict.fromkeys(axes[key], torch.export.Dim.AUTO) for key in example.kwargs}
    elif dynamic_shapes is None:
        axes = automatic_axes(example)
        dims = {key: dict.fromkeys(axes[key], torch.export.Dim.AUTO) if key in axes else None for key in example.kwargs}
    else:
        axes, dims = given_axes(example, dynamic_shapes)
    check_sizes(example, axes)
    with staged(path, ".onnx") as folder, eval_mode(adapted), torch.no_grad():
        target = Path(path)
        plan = make_plan(adapted, adapters, name, expanded, capacity, rank)
        limit = tolerance_of(plan.module) if tolerance is None else tolerance
        outputs = named_tensors(_run(plan.truth, example))
        traced, its_axes, its_dims = plan.extend(example, axes, dims)
        program = _capture(plan.module, traced, its_dims)
        names, fixed = symbols(program.graph, its_axes)
        for key, axis, label, size in fixed:
            if cache or dynamic_shapes is not None or label == "batch":
                raise ExportError(
                    f"the model fixes axis {axis} ({label!r}) of input {key!r} to {size}: it computes with the number, "
                    "not with the input's size. Leave the axis out of dynamic_shapes, or change the model"
                )
        axes = _without(axes, fixed)
        model = _translate(program, opset)
        del program
        graph.rename_axes(model.model, names)
        forms = base_forms(model.model, plan.base.state_dict())
        opened = plan.open(model.model)
        graph.widen_convolutions(model.model)
        graph.name_outputs(model.model, list(outputs))
        graph.name_transposes(model.model)
        with graph.quiet():
            model.optimize()
        graph.close(model.model, opened)
        plan.close(model.model)
        graph.tidy(model.model)
        described = _describe(model.model, opened)
        about = {
            "adapters": adapters,
            "cache": layers,
            "name": plan.name,
            "model": type(adapted).__name__,
            "specs": _specs(adapted),
            "sites": plan.sites,
            "trained": plan.trained,
            "fingerprint": plan.fingerprint,
            **plan.about(),
            "tolerance": limit,
            "versions": manifest.versions(),
        }
        model.model.metadata_props[manifest.KEY] = manifest.dump(about)
        file = folder / target.name
        _save(model.model, file, external_data, target.parent, forms)
        session = quiet_session(file)
        cases, draws = _cases(example, axes, seed)
        parity = hold_against_torch(plan, session, cases, example.constants, limit)
        record = _record(plan, session, example, axes, parity, draws)
        del session
        seal(file, record)
        files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
        notes = tuple(
            f"axis {axis} of {key} is fixed to {size}: the model computes with the number"
            for key, axis, _, size in fixed
        )
        if has_bfloat16(model.model):
            notes += ("bfloat16: compared in float32 over the same weights, onnxruntime's CPU cannot run it",)
    return OnnxExport(
        path=target,
        adapters=adapters,
        name=plan.name,
        adapter_inputs={key: value.shape for key, value in opened.items()},
        parity=tuple(parity),
        tolerance=limit,
        files=files,
        seconds=time.perf_counter() - started,
        notes=notes,
        **described,
    )


@contextmanager
def eval_mode(adapted: torch.nn.Module) -> Iterator[None]:
    """Eval mode for the time of the export, every module's own flag restored after it."""
    modes = [(module, module.training) for module in adapted.modules()]
    try:
        adapted.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(module: torch.nn.Module, example: Example) -> Any:
    try:
        return module(**example.kwargs)
    except Exception as error:  # whatever the model raises on unfit inputs is the caller's to read
        raise ExportError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error


def _capture(module: torch.nn.Module, example: Example, dims: dict[str, Any]) -> torch.export.ExportedProgram:
    try:
        with graph.quiet():
            shapes = example.shapes(dims)
            called = _without_graph(module)
            return torch.export.export(called, (), example.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises a dozen unrelated classes
        raise ExportError(f"torch.export cannot trace the model: {_brief(error)}") from error


def _without_graph(module: torch.nn.Module) -> torch.nn.Module:
    """A view of the module that torch.export calls: of a `GraphModule` it runs the graph, past a forward that puts
    `adapter_ids` where the sites find them. Same tensors, same names."""
    if not isinstance(module, torch.fx.GraphModule) or OWN_CLASS not in module.__dict__:
        return module

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
    view = type(type(module).__name__, (torch.nn.Module,), {"forward": forward})()
    view.__dict__.update(module.__dict__)
    return view


def _translate(program: torch.export.ExportedProgram, opset: int | None) -> Any:
    try:
        with graph.quiet():
            # Unoptimised: the optimizer would fold and merge the very tensors that become inputs.
            made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=opset)
    except Exception as error:  # as above
        raise ExportError(f"the model does not translate to ONNX: {_brief(error)}") from error
    assert made is not None
    return made


def _save(model: Any, file: Path, external_data: bool | None, folder: Path, forms: Mapping[str, torch.Tensor]) -> None:
    import onnx

    try:
        links = graph.save(model, file, external_data, folder, forms)
        onnx.checker.check_model(str(file))
        link(links)
    except OSError as error:
        raise ExportError(f"cannot write {file.name!r}: {error.strerror or error}") from error
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported graph: {error}") from error


def _without(axes: Axes, fixed: Sequence[tuple[str, int, str, int]]) -> Axes:
    """The axes that stay dynamic."""
    gone = {(key, axis) for key, axis, _, _ in fixed}
    left = {key: {i: label for i, label in named.items() if (key, i) not in gone} for key, named in axes.items()}
    return {key: named for key, named in left.items() if named}


def _cases(example: Example, axes: Axes, seed: int) -> tuple[list[tuple[str, Inputs, int]], list[dict[str, Any]]]:
    """What is compared: the example, and random inputs of other sizes; and those once more as (sizes, seed)."""
    cases: list[tuple[str, Inputs, int]] = [("example", example.tensors, 0)]
    draws = []
    for step, sizes in enumerate(other_sizes(example, axes) or [{}], start=1):
        cases.append((f"random {step}", fresh(example, axes, sizes, seed + step), step - 1))
        draws.append({"sizes": sizes, "seed": seed + step})
    return cases, draws


def _record(
    plan: Plan, session: Any, example: Example, axes: Axes, parity: Sequence[Parity], draws: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """How the export was checked, and what `verify` needs to check it again without the model."""
    names = [value.name for value in session.get_outputs()]
    probes = []
    for one in draws:
        tensors = fresh(example, axes, one["sizes"], one["seed"])
        for case, feeds in plan.probes(tensors):
            ids = {"ids": feeds[ADAPTER_IDS].tolist()} if feeds else {}
            probes.append({**one, **ids, "case": case, "outputs": probe(session, {**tensors, **feeds}, names)})
    return {
        "parity": [dataclasses.asdict(check) for check in parity],
        "inputs": describe_inputs(example),
        "constants": example.constants,
        "axes": axes,
        "probes": probes,
    }


def _rank_free(name: str, shape: Shape) -> bool:
    """Whether an adapter input belongs to a site's form: one of its legs has the site's own free rank."""
    return name.rpartition(".")[2] == "router" or f"{name.rpartition('.')[0]}.rank" in shape


def _specs(adapted: torch.nn.Module) -> dict[str, Any]:
    """The configs of a model's adapters, by name."""
    state = find_state(adapted)
    return {name: record.spec.to_dict() for name, record in state.adapters.items()} if state is not None else {}


def _describe(model: Any, opened: Mapping[str, graph.Opened]) -> dict[str, Any]:
    def shape(value: Any) -> Shape:
        return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)

    inputs = {value.name: shape(value) for value in model.graph.inputs if value.name not in opened}
    axes = {key: {i: dim for i, dim in enumerate(dims) if isinstance(dim, str)} for key, dims in inputs.items()}
    return {
        "inputs": inputs,
        "outputs": {value.name: shape(value) for value in model.graph.outputs},
        "dynamic_axes": {key: named for key, named in axes.items() if named},
        "opset": model.opset_imports[""],
    }


def _brief(error: Exception, lines: int = 12) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: " + "\n".join(text[:lines] + (["..."] if len(text) > lines else []))


__all__ = ["OnnxExport", "export_onnx"]
