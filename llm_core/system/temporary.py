"""Folders in the temporary directory that are deleted even if the process that uses them is killed: by the next one."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_core.errors import UserError
from llm_core.system.locks import is_without_locks

_PREFIX = "textmill-"
_MARK = ".in_use-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A private folder in the temporary directory, deleted at the end, as are those of processes that were killed.

    Raises:
        UserError: see `mark_in_use`.
    """
    for folder in abandoned(_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        mark = mark_in_use(folder)
        try:
            yield folder
        finally:
            os.close(mark)


def mark_in_use(folder: Path) -> int:
    """Keeps a folder from being `abandoned` until the returned descriptor is closed or this process ends.

    Raises:
        UserError: the temporary directory is not writable or has no flock, which PyTorch's ranks need too: they meet in a file
            of such a folder.
    """
    mark = folder.joinpath(f"{_MARK}{os.getpid()}")
    unlocked = folder.joinpath(f".new-{os.getpid()}")  # so that a mark is locked from the start
    try:
        descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            unlocked.rename(mark)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        problem = "its file system has no flock" if is_without_locks(str(error)) else "cannot make a file in it"
        raise UserError(
            f"TMPDIR {tempfile.gettempdir()}: {problem} ({error.strerror}); set TMPDIR to a folder on a local disk"
        ) from None
    return descriptor


def abandoned(prefix: str) -> list[Path]:
    """Folders in the temporary directory that only processes which have ended had marked as in use."""
    folders = []
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # another process may be deleting it
            marks = list(folder.glob(f"{_MARK}*"))
            if marks and not any(map(_is_locked, marks)):
                folders.append(folder)
    return folders


def delete_marks(folder: Path) -> None:
    """Deletes the marks of a folder; those of running processes too."""
    for mark in folder.glob(f"{_MARK}*"):
        mark.unlink(missing_ok=True)


def _is_locked(mark: Path) -> bool:
    """Whether the process that made the mark runs; also True if that is unknown."""
    try:
        descriptor = os.open(mark, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
