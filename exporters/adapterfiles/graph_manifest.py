"""What a graph says about itself: a JSON manifest in its metadata, and the fingerprint that ties adapters to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...rewriter.errors import SessionError

KEY = "fxgraft.manifest"
FORMAT = 1
_SAMPLES = 64


def versions() -> dict[str, str]:
    """Versions of everything that took part in an export."""
    import onnx
    import onnx_ir
    import onnxruntime
    import onnxscript

    modules = (torch, onnx, onnx_ir, onnxscript, onnxruntime)
    return {module.__name__: str(module.__version__) for module in modules}


def dump(manifest: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **manifest}, sort_keys=True)


def load(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The manifest in a graph's metadata; None for a graph fxgraft did not write, or wrote in a later format."""
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        manifest = json.loads(text)
        told = manifest.get("format")
    except (ValueError, AttributeError, RecursionError) as error:
        raise SessionError(f"the graph's manifest ({KEY} in its metadata) is damaged: {error}") from error
    return manifest if told == FORMAT else None


def metadata(session: Any) -> dict[str, str]:
    """The texts of an onnxruntime session's graph. Raises `SessionError` where they are none."""
    try:
        return dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError as error:
        raise SessionError(f"the graph's metadata is damaged: {error}") from error


def renamed(told: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """{model's name: the graph's} of the inputs, and of the outputs, that the graph calls otherwise than the model."""
    sides = told.get("renamed", {})
    try:
        return dict(sides.get("inputs", {})), dict(sides.get("outputs", {}))
    except (AttributeError, TypeError, ValueError) as error:
        raise SessionError(f"the graph's manifest ({KEY} in its metadata) is damaged: {error}") from error


def fingerprint(base: torch.nn.Module, sites: Iterable[str]) -> int:
    """31 bits that identify the base weights under `sites` (dotted module paths, `[i]` for a part of one).

    Hashes key, shape, dtype and 64 evenly spaced values of every parameter and buffer below each site, so a fine-tuned
    or another model of the same shapes is told apart at no cost worth naming. A site whose weight is not called
    `weight` is that parameter, with whatever else its owner holds itself. Heads outside the sites, which are often
    newly initialised, do not count. onnxruntime's adapter files have one 32-bit field for this, the model version.
    """
    wanted = sorted({site.partition("[")[0] for site in sites})
    state = {**dict(base.named_buffers(remove_duplicate=False)), **base.state_dict()}
    digest = hashlib.sha256()
    for site in wanted:
        digest.update(site.encode())
        for key in sorted(_below(site, state)):
            tensor = state[key].detach()
            digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.reshape(-1)
            places = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel())).long()
            if flat.numel():
                digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:4], "little") & 0x7FFFFFFF or 1


def _below(site: str, keys: Iterable[str]) -> list[str]:
    found = [key for key in keys if key.startswith(f"{site}.")]
    if found and site:
        return found
    owner = site.rpartition(".")[0]
    return [key for key in keys if key.rpartition(".")[0] == owner]
