"""The adapter methods, one file or folder each: config, tensors, initialisation, operator, folding."""

from . import dense_form, low_rank_form  # noqa: F401  (forms are found by the method they are of)
from .glora.glora import GLoRA
from .glora.path import GLoRAPath
from .hydralora import routed_form  # noqa: F401
from .hydralora.hydralora import HydraLoRA
from .lora import LoRA
from .lora_sb.lora_sb import LoRASB
from .lora_xs import LoRAXS
from .prolora import PRoLoRA
from .unilora import vector_form  # noqa: F401
from .unilora.unilora import UniLoRA
from .vera import VeRA

__all__ = ["GLoRA", "GLoRAPath", "HydraLoRA", "LoRA", "LoRASB", "LoRAXS", "PRoLoRA", "UniLoRA", "VeRA"]
