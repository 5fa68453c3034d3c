"""Errors of the ONNX exporters and of the ONNX Runtime session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..rewriter.errors import ExportError, FxgraftError, ParityError

__all__ = ["ExportError", "ParityError", "SessionError", "VerifyError", "path_of"]


def path_of(path: Any, what: str, error: type[FxgraftError]) -> Path:
    """The path; the given error where it is none."""
    try:
        return Path(path)
    except TypeError:
        raise error(f"{what}: {path!r} is no path, give a str or a pathlib.Path") from None


class SessionError(FxgraftError, ValueError):
    """An ONNX Runtime session was asked for something it cannot do, or was fed the wrong inputs."""


class VerifyError(FxgraftError, RuntimeError):
    """A graph on disk is damaged, foreign, or no longer does what it did when it was exported."""
