"""Measured figures: their spread, tables and results files."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_core.layout import RunFolder
from llm_core.training import read_metrics

RESULTS = Path(__file__).parent / "results"
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Figure:
    """Repeated measurements of one thing."""

    name: str
    unit: str
    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(min(self.values))} to {_short(max(self.values))})"


def ratios(figure: Figure, to: Figure) -> Figure:
    """Ratios round by round, so that a temporarily slow machine slows both."""
    return Figure(figure.name, "x", [value / other for value, other in zip(figure.values, to.values, strict=True)])


def in_turns(rounds: int, work: Mapping[str, Callable[[], Any]], uncounted: int = 1) -> dict[str, list[float]]:
    """Seconds of each piece of work, all once per round, after `uncounted` warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(-uncounted, rounds):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
            print(".", end="", flush=True)
    print()
    return seconds


def logged(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of a training by kind ("train", "eval", ...), with the time of each line in seconds."""
    records: dict[str, list[dict[str, Any]]] = {}
    for record in read_metrics(RunFolder(run_dir).metrics):
        seconds = datetime.fromisoformat(record["time"]).timestamp()
        records.setdefault(record["kind"], []).append(record | {"time": seconds})
    return records


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def keep(benchmark: str, figures: Iterable[Figure], **details: object) -> Path:
    """Appends the figures to results/<benchmark>.jsonl, one line each, with the machine, the versions and `details`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.jsonl"
    common = {"at": datetime.now(UTC).isoformat(timespec="seconds")} | machine() | details
    with path.open("a") as file:
        for figure in figures:
            file.write(json.dumps(common | asdict(figure) | {"median": figure.median}) + "\n")
    return path


def machine() -> dict[str, object]:
    """The machine and the versions of the packages."""
    # pandas, because PyArrow loads it if it is installed.
    names = ("torch", "tiktoken", "tokenizers", "transformers", "pyarrow", "pandas")
    packages = {name: version(name) for name in names if find_spec(name) is not None}
    return {"cores": CORES, "processor": _processor(), "python": platform.python_version()} | packages


def peak_memory() -> float:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
