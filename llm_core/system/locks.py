"""Locks on folders that only one process at a time may write to."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_core.errors import UserError
from llm_core.system.files import explain_disk_full

_LOCK = ".lock"


@contextmanager
def held(folder: Path, on_busy: Callable[[str], object]) -> Iterator[None]:
    """Locks a folder for this process. Not reentrant; the kernel releases the lock when the process ends.

    on_busy: called with the id of the process that holds the lock, before waiting for it; it may raise instead.

    Raises:
        UserError: the folder is not writable.
    """
    try:
        with explain_disk_full(folder / _LOCK, 1):
            folder.mkdir(parents=True, exist_ok=True)
            # Not open(): its buffer cannot be closed on a full disk. O_CLOEXEC: child processes do not inherit the lock.
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: not a writable folder ({error.strerror}); name another one") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_busy(os.pread(lock, 32, 0).decode() or "unknown")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError):  # on a full disk the process id is lost, not the lock
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


@contextmanager
def preparing(data_dir: Path, log: Callable[[str], object]) -> Iterator[None]:
    """Locks the prepared data; waits, and logs it, while another process is changing it."""
    with held(data_dir, lambda pid: log(f"{data_dir}: process {pid} is changing the prepared data; waiting for it")):
        yield
