"""fxgraft: a model-surgery compiler that grafts parameter-efficient adapters by rewriting torch.fx graphs."""

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
from .rewriter.spec import Spec, Target

__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "FxgraftError",
    "LoRA",
    "MergeError",
    "Spec",
    "SpecError",
    "Target",
    "TargetError",
    "UniLoRA",
    "active",
    "adapter_state",
    "disabled",
    "merge",
    "remove",
    "rewrite",
    "set_active",
    "swap",
]
