"""Locks on files, and on folders that only one process at a time may write to."""

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llm_core.errors import UserError
from llm_core.system.files import UNSUPPORTED, explain_disk_full

_LOCK = ".lock"
_IN_USE = ".in_use"

_NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)


def lock_file(descriptor: int, path: Path, shared: bool = False, wait: bool = False) -> None:
    """Locks an open file until its descriptor is closed or the process ends. path: names the file in errors.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if sys.platform != "linux":
            raise no_locks(path, str(error.strerror)) from None
        _lock_range(descriptor, path, shared, wait)


def _lock_range(descriptor: int, path: Path, shared: bool, wait: bool) -> None:
    """`lock_file` for file systems without flock: fcntl's lock, which Linux ties to the descriptor as flock does."""
    whole_file = struct.pack("hhqqi4x", fcntl.F_RDLCK if shared else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, whole_file)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise no_locks(path, str(error.strerror)) from None
        if error.errno == errno.EACCES:  # POSIX allows it instead of EAGAIN
            raise BlockingIOError(*error.args) from None
        raise


def is_without_locks(reason: str) -> bool:
    """Whether an error message says that the file system has no locks."""
    return any(os.strerror(number) in reason for number in _NO_LOCKS) or "locks are not supported" in reason


def no_locks(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path.parent}: the file system of this folder has no file locks ({reason}); "
        "mount it with locks (Lustre: -o flock), or use a folder on another file system"
    )


@contextmanager
def held(folder: Path, on_busy: Callable[[str], object], name: str = _LOCK, shared: bool = False) -> Iterator[None]:
    """Locks a folder for this process. Not reentrant; the kernel releases the lock when the process ends.

    on_busy: called with the id of the process that holds the lock, before waiting for it; it may raise instead.
    name: of the lock file. shared: other processes may hold the lock too, if it is shared with them.

    Raises:
        UserError: the folder is not writable, or its file system has no locks.
    """
    path = folder / name
    try:
        with explain_disk_full(path, 1):
            folder.mkdir(parents=True, exist_ok=True)
            # Not open(): its buffer cannot be closed on a full disk. O_CLOEXEC: child processes do not inherit the lock.
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: not a writable folder ({error.strerror}); name another one") from None
    try:
        try:
            lock_file(lock, path, shared)
        except BlockingIOError:
            on_busy(os.pread(lock, 32, 0).decode() or "unknown")
            lock_file(lock, path, shared, wait=True)
        if not shared:
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


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keeps garbage collection from removing what is in a folder; any number of processes can use it at a time."""
    with held(folder, lambda _: None, _IN_USE, shared=True):  # a removal in progress takes moments
        yield


@contextmanager
def unused(folder: Path, on_busy: Callable[[str], object]) -> Iterator[None]:
    """The opposite of `in_use`: for removing what is in a folder. on_busy: as for `held`; the process id is not known."""
    with held(folder, on_busy, _IN_USE):
        yield
