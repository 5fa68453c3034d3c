"""The adapter methods, one file each: config, tensors, initialisation, operator, folding."""

from . import bank_dense, bank_hydralora, bank_lora, bank_unilora  # noqa: F401  (a saved spec may name them)
from .glora import GLoRA
from .glora_path import GLoRAPath
from .hydralora import HydraLoRA
from .lora import LoRA
from .lora_sb import LoRASB
from .lora_xs import LoRAXS
from .prolora import PRoLoRA
from .unilora import UniLoRA

__all__ = ["GLoRA", "GLoRAPath", "HydraLoRA", "LoRA", "LoRASB", "LoRAXS", "PRoLoRA", "UniLoRA"]
