"""Errors of the ONNX exporters and of the ONNX Runtime session."""

from __future__ import annotations

from ..rewriter.errors import ExportError, FxgraftError, ParityError

__all__ = ["ExportError", "ParityError", "SessionError", "VerifyError"]


class SessionError(FxgraftError, ValueError):
    """An ONNX Runtime session was asked for something it cannot do, or was fed the wrong inputs."""


class VerifyError(FxgraftError, RuntimeError):
    """A graph on disk is damaged, foreign, or no longer does what it did when it was exported."""
