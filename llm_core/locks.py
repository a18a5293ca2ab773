"""Folders that one process at a time writes to."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_core.errors import UserError
from llm_core.files import says_when_the_disk_is_full


@contextmanager
def held(folder: Path, on_busy: Callable[[str], object]) -> Iterator[None]:
    """Holds a folder for this process, which may not hold it already; the kernel gives it back however the process ends.

    on_busy: called with the id of the process that has the folder, before waiting for it; it raises where waiting is not wanted.

    Raises:
        UserError: it is no folder that this process may write to.
    """
    try:
        with says_when_the_disk_is_full(folder / ".lock", 1):
            folder.mkdir(parents=True, exist_ok=True)
            # Not open(): its buffer could not be closed on a full disk. O_CLOEXEC: programs started from here do not hold it too.
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: not a folder to write to ({error.strerror}); name another one") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_busy(os.pread(lock, 32, 0).decode() or "unknown")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError):  # a full disk takes the number away, not the lock
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


@contextmanager
def preparing(processed_dir: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Holds the folder of the prepared data; waits, and says so, while another process changes what is in it."""
    with held(processed_dir, lambda pid: say(f"{processed_dir}: process {pid} is changing the prepared data; waiting for it")):
        yield
