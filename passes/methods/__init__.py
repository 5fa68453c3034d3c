"""The adapter methods, one file or folder each, and their own verbs: the one place where a method is registered."""

from . import dense_form, low_rank_form  # noqa: F401  (forms are found by the method they are of)
from .glora.glora import GLoRA
from .glora.path import GLoRAPath
from .glora.search import search_paths
from .glora.supernet import fix_paths, get_paths, set_paths
from .hydralora import routed_form  # noqa: F401
from .hydralora.breakdown import lora_breakdown
from .hydralora.experts import suggest_experts
from .hydralora.hydralora import HydraLoRA
from .lora import LoRA
from .lora_sb.estimate import estimate_update
from .lora_sb.lora_sb import LoRASB, UpdateEstimate
from .lora_xs import LoRAXS
from .prolora.prolora import PRoLoRA
from .unilora import vector_form  # noqa: F401
from .unilora.unilora import UniLoRA
from .vera import VeRA

__all__ = [
    "GLoRA",
    "GLoRAPath",
    "HydraLoRA",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "PRoLoRA",
    "UniLoRA",
    "UpdateEstimate",
    "VeRA",
    "estimate_update",
    "fix_paths",
    "get_paths",
    "lora_breakdown",
    "search_paths",
    "set_paths",
    "suggest_experts",
]
