"""The process beside others: its share of the machine, its memory, and an end with the one that started it.

Imported before PyTorch, which takes seconds to load.
"""

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PARENT = os.getppid()


def available_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next request, for as long as this process lives; elsewhere it does nothing.

    Large tensors otherwise go back to the system when they are freed, and a training step asks for the same ones again: zeroed,
    page by page (mallopt(3)).
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(mmap_max, 0)


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Lets Python look for reference cycles seldom: among many small objects without any, that takes an eighth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def die_with_parent(sent: signal.Signals = signal.SIGTERM) -> None:
    """Asks Linux to send this process a signal when its parent dies, and sends it now if the parent is dead already.

    A killed torchrun must leave no rank behind, one that is still loading PyTorch included.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(sent), 0, 0, 0)
        if os.getppid() != _PARENT:
            os.kill(os.getpid(), sent)
