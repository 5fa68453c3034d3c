"""Adapter checkpoints of our own: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

The config carries the format version, the spec, the sites with their shapes, and the versions that wrote it; the
tensors are what `adapter_state` returns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..rewriter.api import adapter_state, check_state, graft_adapter, set_active, write_state
from ..rewriter.errors import AdapterError, CheckpointError, SpecError, TargetError, listing
from ..rewriter.spec import Spec
from ..rewriter.state import M, record_of, unwrap
from .folder import CONFIG, WEIGHTS, Stored, check_config_is_theirs, write_folder

FORMAT, FORMAT_VERSION = "fxgraft", 1
_ABOUT = frozenset({"versions"})


def save_native(
    adapted: nn.Module,
    directory: str | os.PathLike[str],
    name: str = "default",
    values: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one adapter to a folder (made if needed) and return the folder.

    Tensors tied to each other are written as they are; derived tensors are not written. An adapter already there is
    replaced only when the new one is complete.

    Args:
        values: tensors to write in place of the model's own, in the names of `adapter_state`: those gathered from
            several processes.
    """
    root = unwrap(adapted)
    record = record_of(root, name)
    state = {**adapter_state(root, name), **(values or {})}
    tensors = {k: t.cpu().contiguous().clone() for k, t in state.items()}
    if bad := [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise CheckpointError(f"adapter {name!r} has NaN or infinite values in {listing(bad)}; nothing was written")
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("fxgraft")
    except PackageNotFoundError:  # run from a source tree
        own = "source"
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec": record.spec.to_dict(),
        "sites": {s.name: [s.out_features, s.in_features] for s in record.sites},
        "versions": {"fxgraft": own, "torch": torch.__version__},
    }
    write_folder(directory, config, tensors)
    return Path(directory)


def load_native(model: M, stored: Stored, name: str, what: str) -> M:
    """Graft an adapter of ours; the input model is not changed, and nothing is returned unless all of it fits.

    Raises:
        CheckpointError: the files are damaged, of a newer version, or made for another model.
    """
    config = stored.config
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{what} has format version {version!r}, this fxgraft reads {FORMAT_VERSION}; update fxgraft"
        )
    if missing := [k for k in ("spec", "sites") if not isinstance(config.get(k), dict)]:
        raise CheckpointError(f"{what}: {CONFIG} lacks {listing(missing)}")
    if not stored.weights:
        raise CheckpointError(f"{what}: {WEIGHTS} is missing")
    try:
        spec = Spec.from_dict(config["spec"])
    except SpecError as error:
        raise CheckpointError(f"{what}: {error}") from error
    check_config_is_theirs(stored, _ABOUT, what)
    return graft_values(model, spec, name, stored.tensors, what, _sites(config["sites"], what))


def _sites(given: Mapping[str, Any], what: str) -> dict[str, tuple[int, int]]:
    for name, shape in given.items():
        if not isinstance(shape, list) or [type(size) for size in shape] != [int, int]:
            raise CheckpointError(f"{what}: the site {name!r} in its {CONFIG} is {shape!r}, expected [out, in]")
    return {name: (out_features, in_features) for name, (out_features, in_features) in given.items()}


def graft_values(
    model: M,
    spec: Spec,
    name: str,
    tensors: Mapping[str, Tensor],
    what: str,
    sites: Mapping[str, tuple[int, int]] | None = None,
) -> M:
    """Graft a spec and fill it with values that must fit exactly; in the dtype the values are stored in.

    Args:
        tensors: in the names of `adapter_state`.
        what: subject of the error texts.
        sites: name -> `(out, in)` the adapter was made for, checked against the sites the spec finds here;
            its order is the one the adapter's projection was handed out in.
    """
    order = list(sites or ())
    try:
        adapted = graft_adapter(model, spec, name, initialise=False, order=order)
    except (TargetError, SpecError) as error:
        raise CheckpointError(f"{what} does not fit this {type(model).__name__}: {error}") from error
    record = record_of(adapted, name)
    here = {s.name: (s.out_features, s.in_features) for s in record.sites}
    if sites is not None and here != dict(sites):
        missing, extra = [n for n in sites if n not in here], [n for n in here if n not in sites]
        differing = [f"{n}: {sites[n]} there, {here[n]} here" for n in sites if n in here and sites[n] != here[n]]
        raise CheckpointError(
            f"{what} was made for another model than this {type(model).__name__} (shapes are out x in):"
            + (f" missing here {listing(missing, 4)};" if missing else "")
            + (f" unknown there {listing(extra, 4)};" if extra else "")
            + (f" {'; '.join(differing[:4])}" if differing else "")
        )
    expected = adapter_state(adapted, name)
    heads = tuple(f"{path}." for path in record.train)  # these have the base's dtype whatever the adapter's is
    own = {t.dtype for key, t in tensors.items() if not key.startswith(heads)}
    narrow = {site.dtype for site in record.sites} & own - {torch.float32}
    if len(narrow) == 1:  # saved in the dtype of a bf16 / fp16 base instead of the default float32: keep it so
        adapted = graft_adapter(model, spec, name, dtype=narrow.pop(), initialise=False, order=order)
        expected = adapter_state(adapted, name)
    if bad := [k for k, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise CheckpointError(f"{what} has NaN or infinite values in {listing(bad)}")
    try:
        check_state(expected, tensors, what)
    except AdapterError as error:
        raise CheckpointError(f"{error}. The adapter was saved for another model or by another program") from error
    write_state(adapted, name, tensors)
    set_active(adapted, [name])
    return adapted
