"""Writing files so that a reader sees the old ones or the new ones, never half of either."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...rewriter.errors import ExportError

try:
    import fcntl
except ImportError:  # Windows: nobody can tell whether a writer is alive, so its folders are left alone
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 60.0  # seconds a writer waits for another one of the same folder


# -- whole files -------------------------------------------------------------------------------------------------
@contextmanager
def staged(path: str | os.PathLike[str], suffix: str) -> Iterator[Path]:
    """A fresh folder beside `path` to write into; on a clean exit its files are moved next to `path`.

    The folder is on the same file system as the target, so each move is one atomic rename. The file called
    `path.name` goes last: what it refers to (external data) is in place before anybody can open it. After an error,
    the target folder is exactly as it was.

    Raises `ExportError` where the folder is missing or not writable, before the body runs, and where `path` does not
    end in `suffix` or is a folder.
    """
    try:
        target = Path(path)
        target.is_dir()
    except (TypeError, OSError) as error:
        raise ExportError(f"cannot write {path!r}: {error}") from error
    if "\0" in str(target):
        raise ExportError(f"cannot write {path!r}: its name has a NUL byte")
    if target.suffix != suffix:
        raise ExportError(
            f"{str(path)!r} does not end in {suffix!r}; give the file to write, for example 'model{suffix}'"
        )
    if target.is_dir():
        raise ExportError(f"{str(path)!r} is a folder; give the file to write")
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {str(path)!r}: the folder {str(target.parent)!r} does not exist")
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(workspace(f".{target.name}.", target.parent))
        except OSError as error:
            raise ExportError(
                f"cannot write {str(path)!r}: the folder {str(target.parent)!r} is not writable ({error.strerror})"
            ) from error
        yield folder
        _commit(folder, target)


def _commit(folder: Path, target: Path) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    if target.name not in names:
        raise ExportError(f"nothing was written for {str(target)!r}")
    names.remove(target.name)
    new = [name for name in names if not (target.parent / name).exists()]
    try:
        # the workspace is private to the user, but the files in it already carry the umask's mode
        move(folder, target.parent, [*names, target.name])
    except OSError as error:
        for name in new:
            (target.parent / name).unlink(missing_ok=True)
        raise ExportError(f"cannot write {str(target)!r}: {error.strerror}") from error


# -- steps -------------------------------------------------------------------------------------------------------
def move(source: Path, target: Path, names: Sequence[str]) -> None:
    """Move files from one folder to another of the same file system, in this order, each in one step. All of them are
    on the disk before the first appears."""
    for name in names:
        if (target / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{str(target / name)!r} is a folder")
        _sync(source / name)
    for name in names:
        os.replace(source / name, target / name)
    _sync(target)


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems do not know this of folders
            raise
    finally:
        os.close(handle)


@contextmanager
def workspace(prefix: str, parent: Path) -> Iterator[Path]:
    """A private folder in `parent` that is gone afterwards. Those that killed writers left there are removed too.

    A living writer holds a lock on its folder, which ends with its process however that ends.
    """
    _clean(prefix, parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another writer took it for a dead one's before it was locked
        if folder.is_dir():
            break
        _unlock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _clean(prefix: str, parent: Path) -> None:
    for left in parent.iterdir():
        # the names that mkdtemp gives: eight more characters
        if not left.name.startswith(prefix) or len(left.name) != len(prefix) + 8 or not left.is_dir():
            continue
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # its writer lives, or another one cleaned first
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                _unlock(lock)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Those who write into `folder` take turns. Where the file system knows no locks nobody waits.

    Raises `OSError` where another one does not come to an end.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            lock = _lock(folder)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise OSError(f"another process has been writing there for {_PATIENCE:.0f} seconds") from error
            time.sleep(0.005)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, None where there are none here; `BlockingIOError` where another has it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone would leave it to children forked meanwhile
        os.close(lock)
