"""Ctrl-C in a command-line tool: one line instead of a traceback. Imports nothing that takes time to load."""

import os
import signal
from types import FrameType

# The exit code of a tool that Ctrl-C ended, as shells report it.
EXIT_CODE = 128 + signal.SIGINT


def exit_on_interrupt(line: str = "stopped before it began: nothing was changed") -> None:
    """Makes Ctrl-C print a line and end this process at once, for the seconds in which modules are imported.

    Does nothing in background jobs, which ignore Ctrl-C.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\n{line}\n".encode())  # not print, which may be what is interrupted
        os._exit(EXIT_CODE)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
