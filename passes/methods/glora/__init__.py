"""GLoRA (arXiv 2306.07967): the method, its paths, and the search for them."""

from .glora import GLoRA  # noqa: F401 (pickles know it under this name)
