"""HydraLoRA (arXiv 2404.19245): the method, how many experts it wants, and what its adapters share."""

from .hydralora import HydraLoRA  # noqa: F401 (pickles know it under this name)
