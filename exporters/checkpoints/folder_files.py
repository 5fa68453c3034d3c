"""The files of an adapter folder: `adapter_config.json` and `adapter_model.safetensors`, written and read as a pair.

    config, tensors  --write_folder-->  two files  --read_folder-->  Stored: the same pair, or an error

Two files cannot be replaced in one step, so the tensors' file is the one that counts. Its metadata repeats the
config, says which config lay there before it, and has a hash of the tensors. It is moved in place first. A reader that
finds the older config beside it (the writer is between its two steps, or was killed there) takes the config of the
tensors' file. Folders of other programs have no such metadata and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...backends.artifact.bounded_files import Identity, as_path, identity_of, parse_json, read_small
from ...backends.artifact.staging import locked, move, workspace
from ...rewriter.errors import CheckpointError, listing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: entries of the metadata: the config's text, the hash of the config it replaces (empty: none), that of the tensors
OURS, BEFORE, CONTENT = "fxgraft.config", "fxgraft.before", "fxgraft.content"
#: what an adapter may be stored in; what torch can hold and not compute with (float8, packed bits) is refused
DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_MOST = 1 << 17  # tensors; LoRA on every expert of the largest models has about 90,000
_TRIES, _PAUSE = 200, 0.01  # of a reader that finds the folder changing: two seconds


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Args:
        config: the parsed config.
        tensors: empty where there is no tensors' file.
        metadata: of the tensors' file.
        weights: whether there is a tensors' file.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    weights: bool

    @property
    def what(self) -> str:
        """Subject of the error texts."""
        return f"the adapter in {str(self.folder)!r}"


# -- writing -----------------------------------------------------------------------------------------------------
def write_folder(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write config and tensors so that a reader sees both of the old adapter or both of the new one, whenever it looks
    and wherever this is killed. Writers of one folder take turns.

    Raises:
        CheckpointError: the folder cannot be written; an adapter already there is as it was.
    """
    target = as_path(directory)
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked(target), workspace(".adapter-", target) as staging:
            (staging / CONFIG).write_text(text, encoding="utf-8")
            tie = {"format": "pt", OURS: text, BEFORE: _hash_of(target / CONFIG), CONTENT: content(tensors)}
            save_file(dict(tensors), staging / WEIGHTS, metadata={**tie, **(metadata or {})})
            # safetensors writes for the owner alone; the other file has the mode that the user's umask gives
            os.chmod(staging / WEIGHTS, (staging / CONFIG).stat().st_mode & 0o777)
            move(staging, target, (WEIGHTS, CONFIG))
    except (OSError, ValueError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write to {str(target)!r}: {reason}") from error


def writable(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of an adapter as a file holds them: on the CPU, dense, each with memory of its own.

    Raises:
        CheckpointError: a value is not finite, or a tensor is not all there.
    """
    if gone := [key for key, t in tensors.items() if t.is_meta or not t.numel()]:
        raise CheckpointError(
            f"adapter {name!r}: {listing(gone)} has no values here; nothing was written. Parameters that DeepSpeed "
            "ZeRO-3 has partitioned are gathered with deepspeed.zero.GatheredParameters(model.parameters()), those on "
            "the meta device are loaded first"
        )
    dense = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    if bad := [key for key, t in dense.items() if t.is_floating_point() and not torch.isfinite(t).all()]:
        raise CheckpointError(f"adapter {name!r} has NaN or infinite values in {listing(bad)}; nothing was written")
    return dense


def content(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    told = hashlib.sha256()
    for key in sorted(tensors):
        update_hash(told, key, tensors[key])
    return told.hexdigest()


def update_hash(told: Any, key: str, tensor: Tensor) -> None:
    """Add one tensor to a hash."""
    tensor = tensor.cpu().contiguous()
    told.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    if tensor.numel():
        told.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _hash_of(config: Path) -> str:
    try:
        return hashlib.sha256(read_small(config)[0]).hexdigest()
    except (FileNotFoundError, CheckpointError):
        return ""


# -- reading -----------------------------------------------------------------------------------------------------
def read_folder(directory: str | os.PathLike[str], name: str = "default") -> Stored:
    """The adapter in a folder, whoever wrote it: one that was there at one moment. Of a folder with an adapter in each
    of its folders it is the only one, or the one called `name`.

    Raises:
        CheckpointError: no folder of an adapter, a damaged file, or tensors and config of two adapters.
    """
    folder = _adapter_folder(as_path(directory), name)
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        text, config = read_config_bytes(folder)
        weights = identity_of(folder / WEIGHTS)
        try:
            found = _read(folder, text)
        except CheckpointError:
            if _unchanged(folder, config, weights):
                raise
            continue
        if _unchanged(folder, config, weights):
            return found
        # somebody is writing: what was read may be of two adapters, even inside one file, which is opened twice
    raise CheckpointError(f"{str(folder)!r} is being written all the time; no adapter in it could be read")


def _read(folder: Path, text: bytes) -> Stored:
    """The folder with this text as its config on disk."""
    tensors, metadata, weights = _read_weights(folder / WEIGHTS)
    ours = metadata.get(OURS)
    if ours is not None and hashlib.sha256(text).hexdigest() == metadata.get(BEFORE) != _digest(ours):
        text = ours.encode()  # the writer has not come to the config yet, and may never
    if ours is not None and content(tensors) != metadata.get(CONTENT):
        raise CheckpointError(
            f"{str(folder / WEIGHTS)!r} is damaged or was changed: its tensors are not those it was saved with. "
            f"Where the change is meant, safetensors.torch.save_file(tensors, ...) writes them without that record"
        )
    return Stored(folder, parse_json(text, folder / CONFIG), tensors, metadata, weights)


def _unchanged(folder: Path, config: Identity, weights: Identity | None) -> bool:
    return identity_of(folder / CONFIG) == config and identity_of(folder / WEIGHTS) == weights


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _adapter_folder(directory: Path, name: str) -> Path:
    """The folder itself if it holds an adapter, or the one inside it that does; `name` tells between several."""
    try:
        if (directory / CONFIG).is_file() or not directory.is_dir():
            return directory
    except OSError:  # reading it will say what is wrong
        return directory
    # what starts with a dot is a writer's workspace
    inside = sorted(f.parent.name for f in directory.glob(f"*/{CONFIG}") if not f.parent.name.startswith("."))
    if len(inside) == 1 or name in inside:
        return directory / (name if name in inside else inside[0])
    if inside:
        raise CheckpointError(
            f"{str(directory)!r} holds {len(inside)} adapters, {listing(inside)}, and none is called {name!r}: give "
            f"the folder of one, {str(directory / inside[0])!r}"
        )
    return directory


def read_config_bytes(folder: Path) -> tuple[bytes, Identity]:
    """The config as it is on disk, and which file that was."""
    try:
        return read_small(folder / CONFIG)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{str(folder)!r} is not an adapter folder: it has no {CONFIG}") from error


def check_config_is_theirs(stored: Stored, about: frozenset[str]) -> None:
    """Raise where the config was changed after the tensors' file that repeats it was written.

    Args:
        about: keys that say nothing about what the adapter computes, and may have changed.
    """
    if (ours := stored.metadata.get(OURS)) is None:
        return
    saved = parse_json(ours.encode(), f"{WEIGHTS} (its {OURS})")
    known = {*saved, *stored.config} - about
    if changed := sorted(k for k in known if saved.get(k) != stored.config.get(k)):
        raise CheckpointError(
            f"{stored.what}: {listing(changed)} in its {CONFIG} is not what it was saved with: the file was changed, "
            "damaged, or belongs to another adapter. Where the change is meant, write the tensors without that record: "
            "safetensors.torch.save_file(safetensors.torch.load_file(file), file)"
        )


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """Tensors and metadata of a safetensors file. Their sizes are bounded by the file's."""
    try:
        if not path.is_file():
            if os.path.lexists(path):
                raise CheckpointError(f"{str(path)!r} is not a regular file")
            return {}, {}, False
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > _MOST:
                raise CheckpointError(f"{str(path)!r} has {len(keys)} tensors; allowed are {_MOST}")
            tensors = {key: file.get_tensor(key) for key in keys}
            metadata = file.metadata() or {}
    # An unknown dtype is an AttributeError or a KeyError of safetensors, by version
    except (SafetensorError, OSError, ValueError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error
    if odd := sorted({str(t.dtype) for t in tensors.values() if t.dtype not in DTYPES}):
        raise CheckpointError(f"{str(path)!r} has tensors of {', '.join(odd)}, which no adapter is stored in")
    return tensors, metadata, True
