"""fxgraft: a model-surgery compiler that grafts parameter-efficient adapters by rewriting torch.fx graphs."""

from . import passes
from .backends.inductor import compile
from .exporters.checkpoint import load_adapter, save_adapter
from .passes.factors import to_lora
from .passes.merge import merge
from .passes.methods import LoRA, UniLoRA
from .rewriter.api import active, adapter_state, disabled, remove, rewrite, set_active, swap
from .rewriter.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    FxgraftError,
    MergeError,
    SpecError,
    TargetError,
)
from .rewriter.explain import explain
from .rewriter.exported import capture
from .rewriter.passbase import Program
from .rewriter.spec import Spec, Target

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "FxgraftError",
    "LoRA",
    "MergeError",
    "Program",
    "Spec",
    "SpecError",
    "Target",
    "TargetError",
    "UniLoRA",
    "active",
    "adapter_state",
    "capture",
    "compile",
    "disabled",
    "explain",
    "load_adapter",
    "merge",
    "passes",
    "remove",
    "rewrite",
    "save_adapter",
    "set_active",
    "swap",
    "to_lora",
]
