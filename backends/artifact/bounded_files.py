"""Reading small text files that anybody may have written: bounded in size and depth, regular files only."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from ...rewriter.errors import CheckpointError

LIMIT = 64 << 20  # bytes; the config of an adapter of 100,000 sites has about 10
_DIGITS = 40  # of a whole number
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")

Identity = tuple[int, int, int, int]


def read_small(path: Path) -> tuple[bytes, Identity]:
    """The bytes of a file and its identity. `FileNotFoundError` and `NotADirectoryError` are the caller's to word.

    Raises:
        CheckpointError: not a regular file, too large, or not readable.
    """
    try:
        # a pipe would wait for somebody to write
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise CheckpointError(f"{str(path)!r} is not a regular file")
            if about.st_size > LIMIT:
                raise CheckpointError(
                    f"{str(path)!r} has {about.st_size} bytes, and no config of an adapter is larger than {LIMIT}"
                )
            return file.read(LIMIT), _identity(about)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def as_path(given: str | os.PathLike[str]) -> Path:
    """A path, or `CheckpointError` for what cannot be one."""
    try:
        path = Path(given)
    except TypeError as error:
        raise CheckpointError(f"{given!r} is not a path: {error}") from error
    if "\0" in str(path):
        raise CheckpointError(f"{given!r} is not a path: it has a NUL byte")
    return path


def check_regular(path: Path) -> None:
    """Raise for pipes, devices and folders. `OSError` of a path that leads nowhere is the caller's to word."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{str(path)!r} is not a regular file")


def sha256(path: Path, size: int | None = None) -> str:
    """Of the first `size` bytes of a file; None: of all."""
    digest = hashlib.sha256()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as stream:
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def identity_of(path: Path) -> Identity | None:
    """Which file a path leads to now, None where it leads to none."""
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _identity(about: os.stat_result) -> Identity:
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size


def parse_json(text: bytes, where: Any) -> dict[str, Any]:
    """A JSON object; a UTF-8 byte order mark may stand before it. Raises `CheckpointError`."""
    try:
        config = load_json(text)
    except ValueError as error:
        raise CheckpointError(f"{str(where)!r} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{str(where)!r} holds {type(config).__name__}, expected an object")
    return config


def load_json(text: bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: no JSON in UTF-8, nested without end, numbers that no config has, or one key twice.
    """
    if text.startswith(_WIDE) or b"\0" in text[:4]:
        raise ValueError("it is UTF-16 or UTF-32 text. Save it as UTF-8")
    try:
        return json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if value - value != 0:
        raise ValueError(f"{number[:_DIGITS]} is no finite number")
    return value
