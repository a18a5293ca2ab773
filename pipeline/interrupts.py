"""Signals that wait until what must not be torn apart is done."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def postponed_interrupts() -> Iterator[Callable[[], bool]]:
    """Notes SIGINT and SIGTERM while the block runs and delivers the first of them when it ends.

    Dagster cancels a run by a signal whose handler raises, at whatever instruction the step has come to: between the start of a
    process and the variable that would hold it, or in the midst of its stopping. Outside the main thread, where Python handles
    no signals, nothing is noted.

    Yields:
        Whether there was one so far.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, note)
        yield lambda: bool(noted)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[0])
