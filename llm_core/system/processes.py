"""Cores, memory, umask and parent of this process. Imported before PyTorch, which takes seconds to load."""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder

_PARENT = os.getppid()


def available_cores() -> int:
    """Number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for reuse (mallopt(3)); does nothing elsewhere.

    By default glibc returns large tensors to the kernel, and each training step gets the same memory back, zeroed page by page.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(mmap_max, 0)


@contextmanager
def infrequent_garbage_collection() -> Iterator[None]:
    """Makes Python search for reference cycles rarely: with many small objects the search takes an eighth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def leave_pandas_out() -> None:
    """Keeps PyArrow from loading pandas, where it is installed: that takes a second.

    PyArrow would do so for its first array, to recognize values of pandas, of which a process that calls this has none.
    """
    import pyarrow as pa

    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, finder := _NoPandas())
        pa.array([0])  # PyArrow tries once
        sys.meta_path.remove(finder)


def die_with_parent(sent: signal.Signals = signal.SIGTERM) -> None:
    """Asks Linux to send this process a signal when its parent dies; sends it now if the parent has died already.

    A killed torchrun must leave no rank behind, not even one that is still loading PyTorch.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(sent), 0, 0, 0)
        if os.getppid() != _PARENT:
            os.kill(os.getpid(), sent)


def restrict_umask() -> None:
    """Makes files of this process and its children writable by their owner only.

    A umask that excludes others already is kept, such as 002 for folders shared by a group.
    """
    present = os.umask(0o022)
    if not present & 0o002:
        present |= 0o022
    os.umask(present)
