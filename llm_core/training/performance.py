"""Measures a run: throughput, model FLOPs utilization (MFU), time per phase, and traces of single steps."""

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, schedule

from llm_core.layout import RunFolder


class Throughput:
    """Tokens per second of training, without the first steps and the pauses for validation and saving."""

    def __init__(self, warmup_steps: int, flops_per_token: int, peak_flops: float) -> None:
        self._warmup_steps = warmup_steps
        self._utilization_per_token = flops_per_token / peak_flops
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)
        self._since = time.perf_counter()

    def step_done(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._warmup_steps:
            self._warmup_steps -= 1
        else:
            self._recent.append((tokens, now - self._since))
        self._since = now

    def resume(self) -> None:
        """Ends a pause: the time since the last step does not count."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """Mean of the last 50 steps, all ranks together; 0 before the first measured step."""
        seconds = sum(elapsed for _, elapsed in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    @property
    def mfu(self) -> float:
        """FLOPs per token x tokens per second / peak FLOPs per second of all ranks (Chowdhery et al. 2022, PaLM, appendix B).

        At most 1: the peak may have been measured while other processes were using the device.
        """
        return min(1.0, self.tokens_per_second * self._utilization_per_token)

    @property
    def seconds_per_step(self) -> float:
        return sum(elapsed for _, elapsed in self._recent) / len(self._recent) if self._recent else 0.0


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measures FLOPs per second of a large matrix product, the fastest of those that fit into `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b  # warm-up
    _synchronize(device)
    fastest, began = math.inf, time.perf_counter()
    while fastest == math.inf or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / max(fastest, 1e-9)  # a coarse clock can measure 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Seconds by phase: each lap adds the time since the previous one to its phase.

    A GPU works asynchronously: the time it still needs is counted as clipping, which waits for the norm.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


@contextmanager
def step_profiler(steps: str | None, run_dir: Path, rank: int, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Traces `steps`, START:END of the steps of this process, counted from 0. Yields a function to call after each step.

    The trace is a file in `run_dir`, one per rank.
    """
    if steps is None:
        yield lambda: None
        return
    start, end = (int(number) for number in steps.split(":"))
    run_dir.mkdir(parents=True, exist_ok=True)  # only rank 0's machine has it
    path = RunFolder(run_dir).trace(rank)
    warmup = min(start, 1)  # keeps the profiler's own start out of the trace, unless it begins at step 0

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        log(f"trace of steps {steps} in {path}, for chrome://tracing or ui.perfetto.dev")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Profiler won't be using warmup")
        plan = schedule(wait=start - warmup, warmup=warmup, active=end - start, repeat=1)
    with profile(schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step


def duration(seconds: float) -> str:
    """Seconds in a readable form: "2m 05s", "3h 20m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
