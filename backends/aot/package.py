"""`package`: an adapted model as one .pt2 file that runs without the model's Python.

model  ->  torch.export  ->  packaged pipeline  ->  AOTInductor  ->  archive + manifest  ->  compared with torch
"""

from __future__ import annotations

import io
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...passes.graph import pipelines
from ...passes.models.dequantise import dequantised
from ...rewriter.capture.skeleton import copy_skeleton
from ...rewriter.errors import AdapterError, ExportError, listing
from ...rewriter.exported_program import capture
from ...rewriter.modules.offloaded import is_dispatched, loaded
from ...rewriter.modules.wrappers import strip_wrappers, unwrap
from ...rewriter.program_verbs import over_programs
from ...rewriter.state import find_state, record_of
from ...rewriter.switch import active, set_active
from ...rewriter.tensors import adapter_state
from ..artifact.parity import tolerance_of
from ..artifact.signature import Example, automatic_axes, bind, check_sizes, given_axes, named_tensors
from ..artifact.staging import staged
from .describe import describe_adapter, describe_call, dynamic_axes
from .loaded_package import Package
from .package_manifest import machine, own_versions, read, write
from .verify_package import one_sized, verify

# Whatever folds a tensor into the code would make a swap of that tensor silently do nothing.
_FIXED = {
    "aot_inductor.package": True,
    "aot_inductor.use_runtime_constant_folding": False,
    "always_keep_tensor_constants": True,
    "freezing": False,
}


@over_programs
def package(
    adapted: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    name: str | None = None,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compile a model with AOTInductor and write it to `path` (`*.pt2`), for `load_package` and for torch itself.

    The package computes what the model computes in eval mode with the adapters that are active now; their tensors and
    the modules trained with them stay swappable, everything else is fixed. A plain or merged model has nothing to swap.
    The model is not changed, and its base weights are not copied but by AOTInductor itself.

    Before the file appears it is loaded and compared with torch: on the example, on fresh random inputs of other
    sizes, and with other adapter values swapped in. A dynamic axis may have size 1 where that was compared too.

    Args:
        adapted: the model; adapted or not, in any mode, on the device it shall run on.
        example_inputs: a tuple of positional or a mapping of keyword arguments. Tensors become inputs under their
            parameter names; None, bool, int, float and str become constants.
        name: package this adapter, whichever is active; None takes all the active ones.
        dynamic_shapes: {input: {axis: name or torch.export.Dim}}; None makes the batch axis, and the sequence axis of
            integer and mask inputs, dynamic; {} fixes every axis. A dynamic axis is at least 2 in the example.
        options: Inductor's, as for `torch.compile(options=...)`.
        tolerance: largest allowed difference from torch over the largest value of an output; None picks by dtype
            (float32 5e-5).
        seed: of the random inputs.

    Returns:
        The manifest: what `load_package(path).manifest` holds.

    Raises:
        ExportError: the model does not export or compile, or the path cannot be written; `ParityError` where the
            numbers differ. What was at `path` before is still there.
        AdapterError: no adapter of that name, or its tensors are not finite.
    """
    started = time.perf_counter()
    if not isinstance(adapted, nn.Module):
        raise ExportError(f"package({type(adapted).__name__}, ...): give the model, an nn.Module")
    options = dict(options or {})
    if fixed := [key for key in options if key in _FIXED or key == "aot_inductor.output_path"]:
        raise ExportError(f"package sets the option(s) {listing(fixed)} itself")
    twin, adapters = _twin(unwrap(adapted), name)
    states = {key: _values(twin, key) for key in adapters}
    example = _contiguous(bind(twin, example_inputs))
    if dynamic_shapes is None:
        axes = automatic_axes(example)
        dims: dict[str, Any] = {key: dict.fromkeys(axes[key], torch.export.Dim.AUTO) for key in axes}
    else:
        axes, dims = given_axes(example, dynamic_shapes)
    check_sizes(example, axes)
    if example.extra and dims:
        raise ExportError(
            f"{type(adapted).__name__}.forward takes {listing(example.extra)} through **{example.catch_all}, and "
            "torch.export has no dynamic axes there: name them in forward, or fix every axis with dynamic_shapes={}"
        )
    with staged(path, ".pt2") as folder, torch.no_grad(), _quiet():
        file = folder / Path(path).name
        output = _run(twin, example)
        outputs = named_tensors(output)
        program = capture(twin, example.kwargs, example.shapes(dims) if dims else None)
        assert program.exported is not None
        axes, limits = dynamic_axes(program.exported, axes, dims, dynamic_shapes is not None)
        graph_module = pipelines.packaged(program).program.graph_module
        held = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
        device = next(iter(example.tensors.values())).device
        manifest: dict[str, Any] = {
            "versions": own_versions(),
            "machine": machine(device),
            **describe_call(twin, example, output, axes),
            "axes": limits,
            "adapters": {key: describe_adapter(twin, key, held) for key in adapters},
        }
        _name_outputs(graph_module, list(outputs))
        del program
        _compile(graph_module, example, options, file)
        del graph_module
        loaded = Package(file, manifest, states)
        limit = tolerance_of(twin) if tolerance is None else tolerance
        one_sized(loaded, twin, example, axes, limit, seed)
        checks = verify(loaded, twin, example, axes, limit, seed)
        manifest["parity"] = [vars(check) for check in checks]
        manifest["seconds"] = time.perf_counter() - started
        try:
            write(file, manifest, states)
        except OSError as error:
            raise ExportError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
        manifest, _ = read(file)
    return manifest


def _twin(root: nn.Module, name: str | None) -> tuple[nn.Module, list[str]]:
    """A copy in eval mode over the same base weights, with the chosen adapter active, and what is active."""
    twin = dequantised(strip_wrappers(copy_skeleton(root)))
    if is_dispatched(twin):
        loaded(twin)
    if name is not None:
        record_of(twin, name)
        set_active(twin, [name])
    for module in twin.modules():  # exported graphs refuse .eval()
        module.training = False
    return twin, active(twin) if find_state(twin) else []


def _values(twin: nn.Module, name: str) -> dict[str, Tensor]:
    state = {key: tensor.cpu().contiguous().clone() for key, tensor in adapter_state(twin, name).items()}
    if bad := [k for k, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise AdapterError(f"adapter {name!r} has NaN or infinite values in {listing(bad)}; nothing was written")
    return state


def _contiguous(example: Example) -> Example:
    """Compiled code expects inputs laid out as in the example, and a package makes whatever it gets contiguous."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in example.tensors.items()}
    return Example(tensors, example.constants, example.catch_all, example.extra)


def _run(model: nn.Module, example: Example) -> Any:
    try:
        return model(**example.kwargs)
    except Exception as error:  # whatever the model raises on unfit inputs is the caller's to read
        raise ExportError(f"the model does not run on example_inputs: {type(error).__name__}: {error}") from error


def _name_outputs(graph_module: fx.GraphModule, names: list[str]) -> None:
    """Make the graph give its tensors as one dict of names: the model's output class may not exist where it runs."""
    node = graph_module.graph.output_node()
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(node.args[0]) if isinstance(leaf, fx.Node)]
    if len(tensors) != len(names):
        raise ExportError(f"the graph has {len(tensors)} outputs, the model {len(names)}: {', '.join(names)}")
    node.args = (tuple(tensors),)
    codegen: Any = graph_module.graph._codegen
    form = torch.utils._pytree.tree_structure(dict.fromkeys(names, 0))
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=form)
    graph_module.recompile()


def _compile(graph_module: fx.GraphModule, example: Example, options: Mapping[str, Any], file: Path) -> None:
    from torch._inductor import aot_compile
    from torch.export.pt2_archive._package import package_pt2

    # Threads: by default the compiler bakes in how many this process may use now.
    settings = {"cpp.dynamic_threads": True, **options, **_FIXED}
    # A folder of our own: the compiler's cache would keep a second copy of the weights for good.
    with tempfile.TemporaryDirectory(prefix="fxgraft-") as build:
        try:
            settings["aot_inductor.output_path"] = build
            files: Any = aot_compile(graph_module, (), example.kwargs, options=settings)
        except Exception as error:  # Inductor and the C++ compiler raise dozens of unrelated classes
            text = "\n".join(str(error).strip().splitlines()[:12])
            raise ExportError(f"AOTInductor does not compile the model: {type(error).__name__}: {text}") from error
        try:
            with open(file, "wb", buffering=0) as raw:
                sink = Sink(raw)
                package_pt2(sink, aoti_files=files)  # type: ignore[arg-type]
                sink.raise_failure()
        except (OSError, RuntimeError) as error:
            raise ExportError(f"cannot write {file.name!r}: {error}") from error


class Sink(io.RawIOBase):
    """A file for torch's archive writer, which ends the whole process where a write fails: this one never fails it.

    The first failure is kept, what comes after it is dropped, and `raise_failure` raises it when the writer is gone.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__()
        self._file = file
        self._failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:  # torch asks, only appends, and goes to the start when all is written
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            done = 0
            while self._failure is None and done < len(view):
                done += self._file.write(view[done:]) or 0
        except OSError as error:
            self._failure = error
        return len(view)

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's remarks about its own deprecated calls are not for the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
