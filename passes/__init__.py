"""Graph-to-graph steps and the adapter methods."""

from . import pipelines

__all__ = ["pipelines"]
