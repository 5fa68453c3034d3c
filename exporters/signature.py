"""The names of `rewriter.signature`, where they live now."""

from ..rewriter.signature import *  # noqa: F403
