"""PRoLoRA (arXiv 2402.16902): LoRA whose factors repeat a small chunk."""

from .prolora import PRoLoRA  # noqa: F401 (pickles know it under this name)
