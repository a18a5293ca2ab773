"""A new database file in the place of one that others may be reading.

A rename takes the name from the old file, not its content: whoever has it open reads on in the state of before, and the next to
open the name finds the new file. What DuckDB has logged beside the old file must never come to stand beside the new one, nor be
lost while the old one is there: the logs are set aside first, and put back unless the new file has taken the name.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_core.files import fsync_path, says_when_the_disk_is_full

_LOGS = (".wal", ".wal.checkpoint", ".wal.recovery")
"""What DuckDB adds to a database's name for the files that hold what the database itself does not hold yet."""

_FRESH, _ASIDE = ".new", ".aside"


def lock_out_writers(path: Path) -> int | None:
    """A descriptor of the database at `path` that keeps DuckDB from opening it for writing; None if somebody has it so already.

    Until it is closed, this process must not open and close the file in any other way: the lock would go with that.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Gives the path for a new database, which takes the place of the one at `path` when the block ends without an error.

    The caller keeps everybody else from writing to the old one, and closes the new one with nothing left in its log.

    Raises:
        DataError: the disk is full; the old one is as it was.
        OSError: the disk refused for another reason; likewise.
    """
    fresh = beside(path, _FRESH)
    settle_logs(path)
    delete_database(fresh)  # what a killed process left
    try:
        yield fresh
        with says_when_the_disk_is_full(fresh, fresh.stat().st_size):
            fsync_path(fresh)
            for log in _LOGS:
                with suppress(FileNotFoundError):
                    beside(path, log).rename(beside(path, log + _ASIDE))
            fsync_path(path.parent)
            os.replace(fresh, path)
            fsync_path(path.parent)
    finally:
        settle_logs(path)  # before the new file goes, which tells it what to do
        delete_database(fresh)


def settle_logs(path: Path) -> None:
    """Puts back the logs that were set aside if the new file did not take its place; they are out of date if it did.

    Several processes may do so at once, as long as none of them is replacing the file.
    """
    for log in _LOGS:
        aside = beside(path, log + _ASIDE)
        if aside.exists():
            with suppress(FileNotFoundError):  # another was faster
                if beside(path, _FRESH).exists():
                    aside.rename(beside(path, log))
                else:
                    aside.unlink()


def copy_database(source: int, path: Path, target: Path) -> None:
    """Copies the database at `path`, open as `source` and kept from writers, and what is logged beside it, to `target`.

    Raises:
        OSError: the disk refused.
    """
    with open(source, "rb", closefd=False) as old, open(target, "wb") as new:
        old.seek(0)
        shutil.copyfileobj(old, new, 1 << 20)
        os.fchmod(new.fileno(), os.fstat(source).st_mode & 0o777)
    for log in _LOGS:
        with suppress(FileNotFoundError):
            shutil.copyfile(beside(path, log), beside(target, log))


def beside(path: Path, suffix: str) -> Path:
    """The file next to `path` that has its name and `suffix`."""
    return path.with_name(path.name + suffix)


def delete_database(path: Path) -> None:
    """Deletes a database and the files beside it, whichever of them there are."""
    for suffix in ("", *_LOGS, ".lock", ".queue"):
        beside(path, suffix).unlink(missing_ok=True)
