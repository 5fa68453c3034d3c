"""LoRA-SB (arXiv 2411.19557): the method, and the estimate of the first update that it starts from."""

from .lora_sb import LoRASB, UpdateEstimate  # noqa: F401 (pickles know them under this name)
