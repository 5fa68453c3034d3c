"""The `torch.compile` backend "fxgraft": dialect passes on the Dynamo graph, then Inductor.

    Dynamo graph with dialect nodes  ->  pipeline  ->  AOTAutograd + Inductor

Works for training and inference. Dialect nodes that no pass rewrites decompose into ATen by themselves.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx

from ...passes.graph.pipelines import pipeline_for
from ...rewriter.errors import FxgraftError
from ...rewriter.explain import COMPILED, CompileNote, note_of
from ...rewriter.modules.unreached_sites import check_graph
from ...rewriter.modules.wrappers import M, unwrap
from ...rewriter.program import Pipeline, Program
from ...rewriter.program_verbs import over_programs
from .gather_apart import GatherApart
from .kernel_preference import KernelPreference, check, plan, preference


def fxgraft(
    gm: fx.GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    kernels: KernelPreference = KernelPreference.AUTO,
    notes: list[CompileNote] | None = None,
    root: weakref.ref[torch.nn.Module] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. Accepts Inductor's `mode` and `options`; what the passes did is added to `notes`."""
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(kwargs.pop("mode", None) or "default"))
    patches.update(kwargs.pop("options", None) or {})
    if kwargs:
        raise FxgraftError(f"backend 'fxgraft' does not know {sorted(kwargs)}; allowed are mode and options")
    model = root() if root is not None else None
    if model is not None and (wrong := check_graph(model, gm.graph, _given(gm))) is not None:
        return _refuse(wrong)
    program = Program(gm, tuple(example_inputs), training=torch.is_grad_enabled())
    graphed = bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))
    pipeline, choice = plan(kernels, pipeline_for(program), program, graphed)
    pipeline = Pipeline(pipeline.name, (*pipeline, GatherApart()))
    result = pipeline(program)
    if notes is not None:
        notes.append(note_of(pipeline.name, result, choice))
    compiled: Any = compile_fx(result.program.graph_module, example_inputs, config_patches=patches)
    return compiled


def _given(gm: fx.GraphModule) -> dict[fx.Node, torch.Tensor]:
    """The tensors of the model that a Dynamo graph reads, by node."""
    found = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = getattr(node.meta.get("grapharg"), "example", None)
        else:
            value = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor):
            found[node] = value
    return found


def _refuse(error: FxgraftError) -> Callable[..., Any]:
    def raises(*args: Any) -> Any:
        raise error

    return raises


def register() -> None:
    """Make `torch.compile(backend="fxgraft")` work in a process where the package's entry point is not installed."""
    import torch._dynamo as dynamo

    if "fxgraft" not in dynamo.list_backends():
        dynamo.register_backend(fxgraft, name="fxgraft")


@over_programs
def compile(
    model: M, *, kernels: Literal["auto", "aten", "triton"] | KernelPreference = KernelPreference.AUTO, **options: Any
) -> M:
    """`torch.compile(model, backend="fxgraft", **options)`: training and serving, one graph per distinct structure.

    Args:
        kernels: `"auto"`, `"aten"` or `"triton"` (`KernelPreference`): whether adapters may run as our Triton kernels.
        options: those of `torch.compile`; `mode` and `options` are Inductor's. Kernels gain most with
            `mode="reduce-overhead"`, where CUDA graphs take the cost of asking for them.

    `set_active`, `disabled`, `swap` and `explain` take the compiled model as well as the model inside; `explain` also
    says what the passes made of each graph that was compiled, and why they left the rest.

    Raises:
        FxgraftError: another backend is asked for, `kernels` is no preference, or `"triton"` cannot be had here.
    """
    if "backend" in options:
        raise FxgraftError("fg.compile always uses the backend 'fxgraft'; call torch.compile for another one")
    wanted = preference(kernels)
    if wanted is KernelPreference.TRITON:
        check(model)
    notes: list[CompileNote] = []
    unwrap(model).__dict__[COMPILED] = notes
    backend = functools.partial(fxgraft, kernels=wanted, notes=notes, root=weakref.ref(unwrap(model)))
    return torch.compile(model, backend=backend, **options)  # type: ignore[return-value]
