"""The adapter methods, one file or folder each: config, tensors, initialisation, operator, folding."""

from . import dense_bank, lora_bank  # noqa: F401  (a saved spec may name them)
from .glora.glora import GLoRA
from .glora.path import GLoRAPath
from .hydralora import hydralora_bank  # noqa: F401  (a saved spec may name them)
from .hydralora.hydralora import HydraLoRA
from .lora import LoRA
from .lora_sb.lora_sb import LoRASB
from .lora_xs import LoRAXS
from .prolora import PRoLoRA
from .unilora import unilora_bank  # noqa: F401  (a saved spec may name them)
from .unilora.unilora import UniLoRA
from .vera import VeRA

__all__ = ["GLoRA", "GLoRAPath", "HydraLoRA", "LoRA", "LoRASB", "LoRAXS", "PRoLoRA", "UniLoRA", "VeRA"]
