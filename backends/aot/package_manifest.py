"""What a package says about itself, read and checked before any of its native code runs.

A package is torch's .pt2 archive (a zip file) with members of ours beside torch's:

    extra/fxgraft.json                     the manifest: format, machine, inputs, outputs, adapters, content hash
    data/fxgraft/<adapter>.safetensors     an adapter's tensors as they were packaged
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...rewriter.adapter_state import methods_from_dict
from ...rewriter.errors import PackageError, SpecError
from .archive_layout import check_layout

FORMAT = 1
MANIFEST = "extra/fxgraft.json"
STATES = "data/fxgraft/"  # torch reads whatever is in extra/ as text
_CHUNK = 1 << 20
# What a C++ compiler told to use everything of this CPU puts into code by itself. Encryption, cache control and matrix
# tiles are left to intrinsics, and the one AMD extension that only AMD has to nobody.
_EMITTED = (
    "sse",
    "ssse3",
    "avx",
    "fma",
    "bmi",
    "f16c",
    "popcnt",
    "lzcnt",
    "neon",
    "sve",
    "dot",
    "i8mm",
    "bf16",
    "fp16",
)
_NEVER = ("sse4a", "fma4")

_FORM: Mapping[str, type] = {
    **{"machine": dict, "inputs": dict, "constants": dict, "axes": dict, "adapters": dict, "versions": dict},
    **{"positional": list, "output_names": list, "content": str},
}

State = dict[str, Tensor]


def machine(device: torch.device) -> dict[str, Any]:
    """What native code depends on: torch, the operating system, the processor and its extensions, the GPU."""
    gpu = list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    return {
        "torch": torch.__version__,
        "platform": sys.platform,
        "machine": platform.machine(),
        "device": device.type,
        "gpu": gpu,
        "cpu": cpu_extensions(),
    }


def cpu_extensions() -> dict[str, Any]:
    """The vector extensions of this CPU that compiled code may use, and the length of its scalable vectors."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is None:  # torch 2.11 answers for the x86 families only
        found = {"avx2": torch.cpu._is_avx2_supported(), "avx512_f": torch.cpu._is_avx512_supported()}
    else:
        found = {k: v for k, v in query().items() if k.startswith(_EMITTED) and k not in _NEVER}
    return {name: value for name, value in sorted(found.items()) if value}


def check_machine(manifest: Mapping[str, Any], path: Path) -> None:
    """Raise `PackageError` with every reason why this process cannot run the package."""
    made = manifest["machine"]
    here = machine(torch.device("cpu"))
    reasons = []
    if made["torch"].split(".")[:2] != here["torch"].split(".")[:2]:
        reasons.append(f"it was made with torch {made['torch']}, here is {here['torch']}: use the same release")
    for what in ("platform", "machine"):
        if made[what] != here[what]:
            reasons.append(f"it was made for {what} {made[what]}, here is {here[what]}")
    if not reasons:  # extensions of another processor have other names
        missing = [name for name, value in made["cpu"].items() if here["cpu"].get(name) != value]
        if missing:
            reasons.append(f"it was compiled for a CPU with {', '.join(missing)}, which this one does not have")
    if made["device"] == "cuda":
        if not torch.cuda.is_available():
            reasons.append("it runs on a CUDA GPU, and torch finds none here")
        elif list(torch.cuda.get_device_capability()) != made["gpu"]:
            reasons.append(
                f"it was compiled for compute capability {made['gpu']}, this GPU has "
                f"{list(torch.cuda.get_device_capability())}"
            )
    if reasons:
        raise PackageError(
            f"{str(path)!r} does not run here: {'; '.join(reasons)}. Package the model again on a machine like this one"
        )


def write(file: Path, manifest: Mapping[str, Any], states: Mapping[str, State]) -> None:
    """Add the adapters' tensors and the manifest, with the hash of everything else, to torch's archive `file`."""
    from safetensors.torch import save

    with zipfile.ZipFile(file, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        for name, state in states.items():
            archive.writestr(zipfile.ZipInfo(f"{root}/{STATES}{name}.safetensors"), save(state))
        text = json.dumps({"format": FORMAT, **manifest, "content": content(archive)}, indent=1)
        archive.writestr(zipfile.ZipInfo(f"{root}/{MANIFEST}"), text)


def content(archive: zipfile.ZipFile) -> str:
    """`sha256:...` over name, size and bytes of every member but the manifest."""
    digest = hashlib.sha256()
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if info.filename.endswith(f"/{MANIFEST}"):
            continue
        digest.update(f"{info.filename}\0{info.file_size}\0".encode())
        with archive.open(info) as member:
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, State]]:
    """The manifest of a package, and its adapters' tensors on the CPU, after every byte has been checked.

    Raises `PackageError` for a file that is missing, no package, not ours, of a later format, or damaged.
    """
    try:
        file = Path(path)
        there = file.is_file()
    except (TypeError, OSError) as error:
        raise PackageError(f"there is no package {path!r}: {error}") from error
    if not there:
        raise PackageError(f"there is no package {str(file)!r}")
    try:
        with zipfile.ZipFile(file) as archive:
            check_layout(archive, file)
            return _read(archive, file)
    except PackageError:
        raise
    # zipfile, json and safetensors raise a dozen unrelated classes on bytes they do not understand.
    except Exception as error:
        if _starts_like_a_zip(file):
            raise PackageError(
                f"{str(file)!r} is damaged or cut off ({type(error).__name__}: {error}); copy or package it again"
            ) from error
        raise PackageError(f"{str(file)!r} is no .pt2 package: give a file that fg.package wrote") from error


def _form_problem(manifest: Mapping[str, Any]) -> str | None:
    """The first thing in a manifest that the rest of fxgraft would stumble over."""
    for key, kind in _FORM.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key!r} is {manifest.get(key)!r}"
    if missing := [key for key in ("torch", "platform", "machine", "device", "cpu") if key not in manifest["machine"]]:
        return f"the machine lacks {missing}"
    for name, adapter in manifest["adapters"].items():
        tensors = adapter.get("tensors") if isinstance(adapter, dict) else None
        if not isinstance(tensors, dict) or not all(_is_tensor(entry) for entry in tensors.values()):
            return f"the tensors of {name!r} are not described"
        try:
            methods_from_dict(adapter.get("methods", {}))
        except (SpecError, TypeError, ValueError, AttributeError) as error:
            return f"the methods of {name!r} are not described ({error})"
    return None


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(getattr(torch, str(entry.get("dtype")), None), torch.dtype)
        and all(isinstance(entry.get(k), list) and all(type(n) is int for n in entry[k]) for k in ("shape", "stride"))
        and isinstance(entry.get("constant"), (str, type(None)))
    )


def _starts_like_a_zip(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(2) == b"PK"


def _read(archive: zipfile.ZipFile, file: Path) -> tuple[dict[str, Any], dict[str, State]]:
    from safetensors.torch import load

    names = archive.namelist()
    own = [name for name in names if name.endswith(f"/{MANIFEST}")]
    if not own:
        raise PackageError(
            f"{str(file)!r} was not written by fg.package: it has no fxgraft manifest. "
            "torch._inductor.aoti_load_package loads torch's own packages"
        )
    manifest = json.loads(archive.read(own[0]))
    if not isinstance(manifest, dict):
        raise PackageError(f"{str(file)!r} is damaged or was changed: its manifest is no object")
    if manifest.get("format") != FORMAT:
        raise PackageError(
            f"{str(file)!r} has format {manifest.get('format')!r}, this fxgraft reads format {FORMAT}: "
            "load it with the fxgraft that wrote it, or package the model again"
        )
    if problem := _form_problem(manifest):
        raise PackageError(f"{str(file)!r} is damaged or was changed: in its manifest, {problem}")
    if content(archive) != manifest["content"]:
        raise PackageError(
            f"{str(file)!r} is damaged or was changed: its content does not match the hash in its manifest"
        )
    root = own[0].removesuffix(MANIFEST)
    return manifest, {name: load(archive.read(f"{root}{STATES}{name}.safetensors")) for name in manifest["adapters"]}


def own_versions() -> dict[str, str]:
    """Versions of the software that made a package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("fxgraft")
    except PackageNotFoundError:  # run from a source tree
        own = "source"
    return {"fxgraft": own, "torch": torch.__version__, "python": platform.python_version()}
