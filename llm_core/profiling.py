"""A trace of a few training steps, for chrome://tracing or Perfetto."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule


@contextmanager
def step_profiler(steps: str | None, directory: Path, rank: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step; `steps` START:END are traced, counted from the 0-based first of this process.

    The trace is written to `trace_rank<R>.json` in `directory`.
    """
    if steps is None:
        yield lambda: None
        return
    start, end = (int(number) for number in steps.split(":"))
    directory.mkdir(parents=True, exist_ok=True)  # on other machines than the first rank's it may not be there yet
    path = directory / f"trace_rank{rank}.json"
    warmup = min(start, 1)  # the profiler's own start, which a trace from step 0 on has in it

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        say(f"trace of steps {steps} in {path}, for chrome://tracing or ui.perfetto.dev")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Profiler won't be using warmup")
        plan = schedule(wait=start - warmup, warmup=warmup, active=end - start, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
