"""Writing files so that a reader sees the old ones or the new ones, never half of either."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..rewriter.errors import ExportError


@contextmanager
def staged(path: str | os.PathLike[str], suffix: str) -> Iterator[Path]:
    """A fresh folder beside `path` to write into; on a clean exit its files are moved next to `path`.

    The folder is on the same file system as the target, so each move is one atomic rename. The file called
    `path.name` goes last: what it refers to (external data) is in place before anybody can open it. After an error,
    the target folder is exactly as it was.

    Raises `ExportError` where the folder is missing or not writable, before the body runs, and where `path` does not
    end in `suffix` or is a folder.
    """
    target = Path(path)
    if target.suffix != suffix:
        raise ExportError(
            f"{str(path)!r} does not end in {suffix!r}; give the file to write, for example 'model{suffix}'"
        )
    if target.is_dir():
        raise ExportError(f"{str(path)!r} is a folder; give the file to write")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {str(path)!r}: the folder {str(target.parent)!r} does not exist")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"cannot write {str(path)!r}: the folder {str(target.parent)!r} is not writable ({error.strerror})"
        ) from error
    try:
        yield folder
        _commit(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commit(folder: Path, target: Path) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    if target.name not in names:
        raise ExportError(f"nothing was written for {str(target)!r}")
    names.remove(target.name)
    new = [name for name in names if not (target.parent / name).exists()]
    try:
        for name in [*names, target.name]:
            # mkdtemp's folder is private to the user, but the files in it already carry the umask's mode.
            os.replace(folder / name, target.parent / name)
    except OSError as error:
        for name in new:
            (target.parent / name).unlink(missing_ok=True)
        raise ExportError(f"cannot write {str(target)!r}: {error.strerror}") from error
