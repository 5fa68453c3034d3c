"""Graph-to-graph steps and the adapter methods."""

from .graph import pipelines

__all__ = ["pipelines"]
