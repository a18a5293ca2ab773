"""Replaces a database file while other processes may be reading it.

After the rename existing readers keep the old file, and processes that open the path get the new one. DuckDB's logs of the old
file must never be next to the new file, and must not be lost before the old one is replaced: they are moved aside first, and
moved back if the replacement does not happen.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_core.errors import UserError
from llm_core.system import explain_disk_full, fsync_path, is_without_locks, no_locks, temporary_folder

# Suffixes of DuckDB's logs: changes that are not in the database file yet.
_LOGS = (".wal", ".wal.checkpoint", ".wal.recovery")

_FRESH, _ASIDE = ".new", ".aside"


def lock_out_writers(path: Path) -> int | None:
    """A descriptor of the database at `path` that prevents DuckDB from opening it for writing; None if a writer has it open.

    Until it is closed, this process must not open and close the file again: that would release the lock.

    Raises:
        UserError: the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise (no_locks(path, "DuckDB needs them") if is_without_locks(str(error)) else error) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Yields the path of a new database that replaces the one at `path` when the block ends without an error.

    The caller prevents writes to the old database, and closes the new one with an empty log.

    Raises:
        DataError: the disk is full; the old database is unchanged.
        OSError: a write failed for another reason; the old database is unchanged.
    """
    fresh = beside(path, _FRESH)
    settle_logs(path)
    delete_database(fresh)  # left by a killed process
    try:
        yield fresh
        with explain_disk_full(fresh, fresh.stat().st_size):
            fsync_path(fresh)
            for log in _LOGS:
                with suppress(FileNotFoundError):
                    beside(path, log).rename(beside(path, log + _ASIDE))
            fsync_path(path.parent)
            os.replace(fresh, path)
            fsync_path(path.parent)
    finally:
        settle_logs(path)  # before the new file is deleted: it shows whether the rename is done
        delete_database(fresh)


def settle_logs(path: Path) -> None:
    """Moves the logs back if the new file has not replaced the old one; deletes them if it has.

    Several processes may do this concurrently while none of them is replacing the file.
    """
    for log in _LOGS:
        aside = beside(path, log + _ASIDE)
        if aside.exists():
            with suppress(FileNotFoundError):  # done by another process
                if beside(path, _FRESH).exists():
                    aside.rename(beside(path, log))
                else:
                    aside.unlink()


def copy_database(source: int, path: Path, target: Path) -> None:
    """Copies the database at `path`, open and locked as `source`, and its logs to `target`. Raises OSError if a write fails."""
    with open(source, "rb", closefd=False) as old, open(target, "wb") as new:
        old.seek(0)
        shutil.copyfileobj(old, new, 1 << 20)
        os.fchmod(new.fileno(), os.fstat(source).st_mode & 0o777)
    _copy_logs(path, target)


def _copy_logs(path: Path, target: Path) -> None:
    for log in _LOGS:
        with suppress(FileNotFoundError):
            shutil.copyfile(beside(path, log), beside(target, log))


def is_misread(path: Path) -> bool:
    r"""Whether DuckDB takes the path for another one: `?` for the start of a URL's parameters, `\` for `/`."""
    return any(character in str(path.resolve()) for character in "?\\")


@contextmanager
def plain_copy(path: Path, read_only: bool) -> Iterator[Path]:
    """Yields a copy of the database under a path that DuckDB can read.

    Unless `read_only`, the copy replaces the database when the block ends without an error. The caller keeps others from writing,
    and closes the copy with an empty log.

    Raises:
        UserError: the folder for temporary files is misread as well.
    """
    with temporary_folder() as folder:
        copy = folder / path.name
        if is_misread(copy):
            raise UserError(f"TMPDIR {copy.parent.parent}: DuckDB cannot open a path with ? or \\; name another folder")
        if path.exists():
            with explain_disk_full(copy, path.stat().st_size):
                shutil.copyfile(path, copy)
                _copy_logs(path, copy)
        yield copy
        if not read_only:
            with replacement(path) as fresh, explain_disk_full(fresh, copy.stat().st_size):
                shutil.copyfile(copy, fresh)


def beside(path: Path, suffix: str) -> Path:
    """The file next to `path` with its name plus `suffix`."""
    return path.with_name(path.name + suffix)


def delete_database(path: Path) -> None:
    """Deletes a database and those of its side files that exist."""
    for suffix in ("", *_LOGS, ".lock", ".queue"):
        beside(path, suffix).unlink(missing_ok=True)
