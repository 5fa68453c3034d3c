"""The adapter methods, one file each: config, tensors, initialisation, operator, folding."""

from .lora import LoRA
from .unilora import UniLoRA

__all__ = ["LoRA", "UniLoRA"]
