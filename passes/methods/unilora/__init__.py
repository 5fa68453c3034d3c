"""Uni-LoRA (arXiv 2506.00799): one vector for a whole model."""

from .unilora import UniLoRA  # noqa: F401 (pickles know it under this name)
