"""A trace of a few training steps, for chrome://tracing or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule


@contextmanager
def step_profiler(steps: str | None, directory: Path, rank: int) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step; `steps` START:END are traced, counted from the 0-based first of this process.

    The trace is written to `trace_rank<R>.json` in `directory`.
    """
    if steps is None:
        yield lambda: None
        return
    start, end = (int(number) for number in steps.split(":"))
    directory.mkdir(parents=True, exist_ok=True)  # on other machines than the first rank's it may not be there yet
    path = directory / f"trace_rank{rank}.json"
    with profile(
        schedule=schedule(wait=start, warmup=0, active=end - start, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
