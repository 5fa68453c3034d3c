"""Every error fxgraft raises on purpose; all of them are a `FxgraftError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class FxgraftError(Exception):
    """Base of all errors of this package. Nothing has been changed when one is raised."""


class SpecError(FxgraftError, ValueError):
    """A method or a spec was given a value it does not allow."""


class TargetError(FxgraftError, LookupError):
    """A target pattern matches nothing, or something that cannot be adapted."""


class CaptureError(FxgraftError, RuntimeError):
    """A module or a model could not be turned into a graph."""


class AdapterError(FxgraftError, ValueError):
    """An adapter name or an adapter's tensors do not fit the model."""


class MergeError(FxgraftError, RuntimeError):
    """An adapter cannot be folded into the base weights."""


class CheckpointError(FxgraftError, RuntimeError):
    """An adapter on disk is damaged, foreign, or does not fit the model."""


class ExportError(FxgraftError, RuntimeError):
    """A model could not be written. What was at the target path before is still there, unchanged."""


class PackageError(FxgraftError, RuntimeError):
    """A package is damaged, foreign or made for another machine, or a loaded one was fed the wrong inputs."""


class ParityError(ExportError):
    """What was written does not compute what torch computes; it has been taken away again."""


class SessionError(FxgraftError, ValueError):
    """An ONNX Runtime session was asked for something it cannot do, or was fed the wrong inputs."""


class VerifyError(FxgraftError, RuntimeError):
    """A graph on disk is damaged, foreign, or no longer does what it did when it was exported."""


def path_of(path: Any, what: str, error: type[FxgraftError]) -> Path:
    """The path; the given error where it is none."""
    try:
        return Path(path)
    except TypeError:
        raise error(f"{what}: {path!r} is no path, give a str or a pathlib.Path") from None


def listing(names: Iterable[str], limit: int = 8) -> str:
    """`'a', 'b', … (12 in all)`: names for an error text, cut where nobody would read on."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"


def near_misses(given: str, known: Iterable[str], limit: int = 5) -> list[str]:
    """The known dotted names closest to `given`, comparing whole names, endings and single components."""
    known = list(dict.fromkeys(known))
    components: dict[str, str] = {}
    for name in known:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            components.setdefault(".".join(parts[-depth:]), name)
    close = difflib.get_close_matches(given, components, n=limit * 2, cutoff=0.5)
    return list(dict.fromkeys(close))[:limit]
