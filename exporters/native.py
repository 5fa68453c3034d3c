"""Adapter checkpoints of our own: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

The config carries the format version, the spec, the sites with their shapes, and the versions that wrote it; the
tensors are what `adapter_state` returns. Both files are written beside the target and moved in place together.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..rewriter.api import adapter_state, check_state, graft_adapter, set_active, write_state
from ..rewriter.errors import AdapterError, CheckpointError, SpecError, TargetError, listing
from ..rewriter.spec import Spec
from ..rewriter.state import M, record_of, unwrap

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT, FORMAT_VERSION = "fxgraft", 1


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
    write_folder(directory, config, tensors, {"format": "pt"})
    return Path(directory)


def write_folder(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
) -> None:
    """Write config and tensors so that a reader sees both of the old adapter or both of the new one."""
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=target))
    except OSError as error:
        raise CheckpointError(f"cannot write to {str(target)!r}: {error.strerror or error}") from error
    try:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(dict(tensors), staging / WEIGHTS, metadata=metadata)
        # tensors first: a config that names tensors which are not there yet would not load
        for file in (WEIGHTS, CONFIG):
            os.replace(staging / file, target / file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the adapter to {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed `adapter_config.json` of a folder, whoever wrote it."""
    path = Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(directory)!r} is not an adapter folder: it has no {CONFIG}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(path)!r} holds {type(config).__name__}, expected an object")
    return config


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a damaged or truncated file is one clear error."""
    if not Path(path).is_file():
        raise CheckpointError(f"{str(path)!r} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error


def load_native(model: M, directory: str | os.PathLike[str], name: str = "default") -> M:
    """Graft an adapter from a folder; the input model is not changed, and nothing is returned unless all of it fits.

    Raises:
        CheckpointError: the files are damaged, of a newer version, or made for another model.
    """
    config = read_config(directory)
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{str(directory)!r} has format version {version!r}, this fxgraft reads {FORMAT_VERSION}; update fxgraft"
        )
    if missing := [k for k in ("spec", "sites") if not isinstance(config.get(k), dict)]:
        raise CheckpointError(f"{str(directory)!r}: {CONFIG} lacks {listing(missing)}")
    tensors = read_tensors(Path(directory) / WEIGHTS)
    try:
        spec = Spec.from_dict(config["spec"])
    except (SpecError, TypeError) as error:
        raise CheckpointError(f"{str(directory)!r}: {error}") from error
    sites = {n: (int(shape[0]), int(shape[1])) for n, shape in config["sites"].items()}
    return graft_values(model, spec, name, tensors, f"the adapter in {str(directory)!r}", sites)


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
