"""Uni-LoRA (arXiv 2506.00799): one vector for a whole model."""
