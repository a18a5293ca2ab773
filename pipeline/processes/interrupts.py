"""Delays signals until a critical section is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def postponed_interrupts() -> Iterator[Callable[[], bool]]:
    """Delays SIGINT and SIGTERM while the block runs, and delivers the first of them when it ends.

    Dagster cancels a run with a signal whose handler raises at any instruction: between starting a process and storing it in a
    variable, or while stopping it. Outside the main thread, where Python handles no signals, this does nothing.

    Yields:
        A function that returns whether a signal has arrived.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, receive)
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
