"""Errors of the ONNX exporters and of the ONNX Runtime session."""

from __future__ import annotations

from ..rewriter.errors import FxgraftError


class ExportError(FxgraftError, RuntimeError):
    """A model could not be written. What was at the target path before is still there, unchanged."""


class ParityError(ExportError):
    """The exported graph does not compute what torch computes; nothing was written."""


class SessionError(FxgraftError, ValueError):
    """An ONNX Runtime session was asked for something it cannot do, or was fed the wrong inputs."""
