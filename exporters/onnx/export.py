"""`export_onnx`: an adapted model as one ONNX graph, checked against torch before it reaches its place."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import torch

from ...backends.artifact.parity import Parity, tolerance_of
from ...backends.artifact.signature import Axes, automatic_axes, bind, check_sizes, given_axes
from ...backends.artifact.staging import staged
from ...rewriter.capture.skeleton import bare
from ...rewriter.errors import ExportError, listing
from ...rewriter.program_verbs import over_programs
from ...rewriter.state import find_state
from ..adapterfiles import graph_manifest as manifest
from .cache.cached_example import cached_example
from .checks.checks import check as check_graph
from .checks.ort_graph import CheckGraph
from .checks.record import Record, write_description
from .export_result import OnnxExport
from .graph import save_graph
from .graph.flat_call import TURN
from .graph.make_graph import make_graph
from .graph.prepare import runnable, working_copy
from .modes.modes import make_plan

MODES = ("merged", "swappable", "bank")
# torch translates to this opset, or converts from it; its converter goes up to the last.
OPSETS = (18, 25)


@over_programs
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
    check: bool = True,
) -> OnnxExport:
    """Write `adapted` to `path` (`*.onnx`) and return what was written.

    adapters        "merged": the adapters folded into the weights, a plain graph.
                    "swappable": the base model with free inputs for one adapter, see below; left out, the graph is the
                    base. `export_ort_adapter` writes adapters of any size for it, `OrtSession` runs them.
                    "bank": the base model with slots for many adapters, and an input `adapter_ids (batch,)` int64 that
                    chooses one for every sample. Slot 0 is the base model. `adapted` is what `fg.bank` gives, or a
                    model whose adapters all become tenants; `OrtSession` fills further slots, by name.
    example_inputs  a tuple of positional or a mapping of keyword arguments; tensors become inputs under their
                    parameter names, None, bool, int, float and str become constants. The entries of a dict, as
                    SentenceTransformer takes one, are inputs under their keys.
    dynamic_shapes  {input: {axis: name or torch.export.Dim}}; None makes the batch axis, and the sequence axis of
                    integer and mask inputs, dynamic; {} fixes every axis. A dynamic axis is at least 2 in the example.
    opset           ONNX opset, 18 to 25; None is the exporter's default.
    name            which adapter; None is the active one ("merged": all active ones).
    cache           of a causal language model: the graph takes the keys and values of the tokens so far and gives them
                    with the new ones added, for generation (`OrtSession.generate`). A sliding window keeps its last
                    tokens; a recurrence keeps its states, and takes one token at a time; an encoder-decoder has both
                    halves in the graph (`exporters.onnx.cache.cached_seq2seq`). A cache that is in the modules, or
                    keeps what its values say, is refused. The example needs `input_ids` (or the features that an
                    encoder takes) alone; inputs and outputs are those of `exporters.onnx.cache.cached_decoder.cached`,
                    an `attention_mask` among them.
    expanded        "swappable": False makes the method's own tensors the inputs, under the names of their checkpoint
                    (Uni-LoRA: the one vector `theta`), all zero by default, and the graph does the method's arithmetic
                    at every run. Only adapters of the same config fit, written with
                    `export_ort_adapter(expanded=False)`. Smaller in memory, and for GLoRA on disk, and slower.
    capacity, rank  "bank": how many tenants, and of which rank, a session makes room for; by default those of the bank.
                    The file holds the tenants it was given and no empty slots, and a session may choose otherwise.
    tolerance       largest allowed difference from torch over the largest value of an output. None judges by the
                    float64 result: a difference above rounding (float32: 2e-6 of the largest value) passes where
                    onnxruntime is at most ten times as far from that result as torch is.
    external_data   weights in files beside the graph, `<sha256>.weights`; None does so beyond 1.5 GB. All graphs of one
                    base model in one folder share the file with its weights; what a graph has besides (merged sites)
                    is in a second one. They stay when a graph is written anew: others may read them.
    check           False writes the graph without running it, and it says so: `OnnxExport.checked`, `fg.verify` and
                    `OrtSession.checked`.

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
    The model is exported in eval mode, from a copy over the same weights: buffers, modes and the example are left as
    they were. Outputs that are no tensors are not in the graph, which `notes` say. Exports of several threads take
    turns. Raises `ExportError` (`ParityError` where the numbers differ); nothing is written then, and a file that was
    at `path` stays.
    """
    started = time.perf_counter()
    if not isinstance(adapted, torch.nn.Module):
        raise ExportError(f"export_onnx({type(adapted).__name__}, ...): give the adapted model, an nn.Module")
    _check_options(adapters, expanded, capacity, rank, opset, seed, tolerance)
    if cache and dynamic_shapes is not None:
        raise ExportError("cache=True makes every axis of the cache and the tokens dynamic; leave dynamic_shapes out")
    with TURN:
        model = working_copy(bare(adapted))
        outputs: Axes = {}
        if cache:
            decoder = cached_example(model, example_inputs)
            model, example_inputs, outputs = decoder.module, decoder.inputs, decoder.outputs
        example = bind(model, example_inputs, dicts=True)
        if cache:
            example = dataclasses.replace(example, ones=decoder.ones)
        if dynamic_shapes is None:
            axes = decoder.axes if cache else automatic_axes(example)
            dims: dict[str, Any] = {key: dict.fromkeys(axes[key], torch.export.Dim.AUTO) for key in axes}
        else:
            axes, dims = given_axes(example, dynamic_shapes)
        check_sizes(example, axes)
        strict = cache or dynamic_shapes is not None
        with staged(path, ".onnx") as folder, torch.no_grad():
            target = Path(path)
            plan = make_plan(model, adapters, name, expanded, capacity, rank)
            example = runnable(plan.truth, example)
            allowed = tolerance_of(plan.module) if tolerance is None else tolerance
            traced, its_axes, its_dims = plan.extend(example, axes, dims)
            made = make_graph(plan, traced, its_axes, its_dims, opset, strict, outputs)
            axes = {key: named for key, named in made.axes.items() if key in example.tensors}
            about = {
                "adapters": adapters,
                "cache": decoder.plan.told_as() if cache else 0,
                "name": plan.name,
                "model": type(adapted).__name__,
                "specs": _specs(model),
                "sites": plan.sites,
                "trained": plan.trained,
                "fingerprint": plan.fingerprint,
                **plan.about(),
                "tolerance": allowed,
                "given_tolerance": tolerance,
                "checked": check,
                "versions": manifest.versions(),
                **({"renamed": made.renamed} if made.renamed else {}),
            }
            file = folder / target.name
            save_graph.save(made.model, file, external_data, target.parent, made.forms)
            made.model = None  # its weights are no longer needed
            record, notes = Record.of(example, axes), made.notes
            if check:
                record, more = check_graph(plan, CheckGraph(file, about), example, axes, seed, tolerance)
                notes += more
            write_description(file, about, record)
            files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    if made.narrow and check:
        notes += ("bfloat16: compared in float32 over the same weights, onnxruntime's CPU cannot run it",)
    return OnnxExport(
        path=target,
        adapters=adapters,
        name=plan.name,
        inputs=made.inputs,
        outputs=made.outputs,
        dynamic_axes=made.dynamic_axes,
        adapter_inputs={key: value.shape for key, value in made.opened.items()},
        opset=made.opset,
        parity=tuple(Parity(**one) for one in record.parity),
        tolerance=allowed,
        files=files,
        seconds=time.perf_counter() - started,
        notes=notes,
        renamed=made.renamed,
        trained=tuple(key for key, value in made.opened.items() if value.site is None),
    )


def _specs(adapted: torch.nn.Module) -> dict[str, Any]:
    """The configs of a model's adapters, by name."""
    state = find_state(adapted)
    return {name: record.spec.to_dict() for name, record in state.adapters.items()} if state is not None else {}


def _check_options(
    adapters: Any, expanded: bool, capacity: Any, rank: Any, opset: Any, seed: Any, tolerance: Any
) -> None:
    if adapters not in MODES:
        raise ExportError(f"adapters={adapters!r} is not one of {listing(MODES)}")
    if not expanded and adapters != "swappable":
        raise ExportError(f"expanded=False is for adapters='swappable', not for {adapters!r}")
    if adapters != "bank" and (capacity is not None or rank is not None):
        raise ExportError(f"capacity= and rank= are for a bank of adapters (adapters='bank'), not for {adapters!r}")
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int)):
        raise ExportError(f"opset={opset!r}: give a whole number from {OPSETS[0]} to {OPSETS[1]}, or None")
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise ExportError(
            f"opset={opset}: this exporter writes opset {OPSETS[0]} to {OPSETS[1]}. "
            + ("Give one of these" if opset > OPSETS[1] else "onnxruntime has run 18 since version 1.14")
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ExportError(f"seed={seed!r}: give a whole number")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 < tolerance < math.inf):
        raise ExportError(f"tolerance={tolerance!r}: give a number above 0, or None")


__all__ = ["OnnxExport", "export_onnx"]
