"""How fast a run goes, and how much of the machine's matrix-product speed that is."""

import math
import time
from collections import deque

import torch


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOPs per second of a large matrix product on this device, the best of what fits into `seconds`.

    This is the peak that MFU (Chowdhery et al. 2022, PaLM, appendix B) is a share of: measured, never taken from a data sheet.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b  # the first product sets things up
    _finish(device)
    fastest, began = math.inf, time.perf_counter()
    while fastest == math.inf or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        a @ b
        _finish(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Where a run's time goes: each lap counts what passed since the one before for its phase.

    On a GPU the work goes on after its launch; what waits for it is the clipping, which reads the norm.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


class Throughput:
    """Tokens per second of training alone: the first steps and the pauses for validation and saving do not count."""

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
        """Ends a pause: what happened since the last step is not counted."""
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """Over the last 50 steps and all ranks; 0 before there is a figure."""
        seconds = sum(elapsed for _, elapsed in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else 0.0

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: FLOPs per token x tokens per second / peak FLOPs per second of all ranks.

        1 where training was faster than the peak: that was measured at a moment when others used the processor.
        """
        return min(1.0, self.tokens_per_second * self._utilization_per_token)

    @property
    def seconds_per_step(self) -> float:
        return sum(elapsed for _, elapsed in self._recent) / len(self._recent) if self._recent else 0.0


def duration(seconds: float) -> str:
    """Seconds as people say them: "2m 05s", "3h 20m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
