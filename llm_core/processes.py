"""Processes that end with the one that started them. Imported before PyTorch, which takes seconds to load."""

import ctypes
import os
import signal
import sys

_PARENT = os.getppid()


def die_with_parent(sent: signal.Signals = signal.SIGTERM) -> None:
    """Asks Linux to send this process a signal when its parent dies, and sends it now if the parent is dead already.

    A killed torchrun must leave no rank behind, one that is still loading PyTorch included.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(sent), 0, 0, 0)
        if os.getppid() != _PARENT:
            os.kill(os.getpid(), sent)
