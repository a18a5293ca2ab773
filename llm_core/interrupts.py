"""Ctrl-C in a command-line tool: one line instead of a traceback. Imports nothing that takes time to load."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn, TypeVar

T = TypeVar("T")

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


def exit_interrupted() -> NoReturn:
    """Ends this process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader of a pipe may have ended too
            stream.flush()
    os._exit(EXIT_CODE)


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interruptible(call: Callable[[], T]) -> T:
    """The result of a call that does not notice signals for a long time, such as one in Rust: Ctrl-C raises here at once.

    The call itself runs in a thread, until the process ends.
    """
    from concurrent.futures import Future
    from threading import Thread

    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result()
