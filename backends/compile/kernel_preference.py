"""`fg.KernelPreference`: whether adapters of a compiled model run as Triton kernels, decided and checked up front."""

from __future__ import annotations

import enum

import torch
from torch import nn

from ...rewriter.dialect import is_dialect
from ...rewriter.errors import FxgraftError
from ...rewriter.grafted_class import Grafted
from ...rewriter.modules.wrappers import unwrap
from ...rewriter.program import Pipeline, Program


class KernelPreference(enum.StrEnum):
    """What `fg.compile(model, kernels=...)` may use for adapters.

    auto: a Triton kernel where the cost gate finds it faster, ATen (through Inductor) elsewhere; needs nothing.
    aten: never a Triton kernel of ours.
    triton: always one; an error where that cannot be.
    """

    AUTO = "auto"
    ATEN = "aten"
    TRITON = "triton"


def preference(given: str | KernelPreference) -> KernelPreference:
    """Raises `FxgraftError` for a name that is none."""
    try:
        return KernelPreference(given)
    except ValueError:
        allowed = ", ".join(repr(p.value) for p in KernelPreference)
        raise FxgraftError(f"kernels={given!r}: allowed are {allowed}") from None


def check(model: nn.Module) -> None:
    """Refuse `kernels='triton'` where it cannot be: without triton or a GPU, for other tensors, dtypes and methods.

    Raises:
        FxgraftError: why, and what to do.
    """
    from ..triton import optional_triton as here
    from ..triton.lower import lowerings

    root = unwrap(model)
    if not here.INSTALLED:
        raise FxgraftError(
            "kernels='triton': triton is not installed; pip install 'fxgraft[triton]', or choose kernels='auto'"
        )
    if "cuda" in here.DEVICES and not torch.cuda.is_available():
        raise FxgraftError(
            f"kernels='triton': this PyTorch ({torch.__version__}) sees no CUDA device; run on one, or choose "
            "kernels='auto', which uses kernels where they can run"
        )
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.device.type not in here.DEVICES:
            raise FxgraftError(
                f"kernels='triton': {name} is on {tensor.device}, and kernels run on {' and '.join(here.DEVICES)}; "
                "move the model there before compiling it, or choose kernels='auto'"
            )
    for name, module in root.named_modules():
        graph = getattr(type(module), "fxgraft_graph", None) if isinstance(module, Grafted) else None
        for node in graph.nodes if graph is not None else ():
            if is_dialect(node.target) and node.target not in lowerings:
                known = ", ".join(sorted(op._schema.name for op in lowerings))
                raise FxgraftError(
                    f"kernels='triton': {node.target._schema.name} at {name!r} has no kernel; those with one are "
                    f"{known}. Choose kernels='auto', which leaves it to ATen"
                )
        dtypes = {p.dtype for p in module._parameters.values() if p is not None} if graph is not None else set()
        if wrong := [d for d in dtypes if d.is_floating_point and d not in here.DTYPES]:
            raise FxgraftError(
                f"kernels='triton': {name!r} has {wrong[0]} weights; kernels take "
                f"{', '.join(map(str, here.DTYPES))}. Convert the model, or choose kernels='auto'"
            )


def plan(wanted: KernelPreference, pipeline: Pipeline, program: Program, graphed: bool) -> tuple[Pipeline, str]:
    """The pipeline, with the kernels' passes where there may be kernels, and a line that says what was chosen."""
    if wanted is KernelPreference.ATEN:
        return pipeline, "aten: no kernels of ours"
    from ..triton import optional_triton as here
    from ..triton.lower import Lower, with_kernels

    if wanted is KernelPreference.AUTO:
        if not any(device in here.DEVICES for device in _devices(program)):
            return pipeline, f"auto: ATen only, as nothing is on {' or '.join(here.DEVICES)}"
        if not here.INSTALLED:
            return pipeline, "auto: ATen only, as triton is not installed"
    lower = Lower(always=wanted is KernelPreference.TRITON, graphed=graphed)
    return with_kernels(pipeline, lower), f"{wanted.value}: triton {here.VERSION}"


def _devices(program: Program) -> set[str]:
    found = {t.device.type for t in (*program.graph_module.parameters(), *program.graph_module.buffers())}
    return found | {t.device.type for t in program.example_inputs if isinstance(t, torch.Tensor)}
