"""Plots for the asset pages, as PNG files and as Markdown with the PNG embedded.

matplotlib is imported where something is drawn: a run that only reuses artifacts starts half a second faster without it.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from llm_core.system import atomic_writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VALIDATION, _BASELINE = "#4c72b0", "#dd8452", "#8c8c8c"


def picture(path: Path, title: str, draw: Callable[[], bytes]) -> dg.MarkdownMetadataValue:
    """The PNG at `path`, drawn only if it does not exist: the path contains everything the picture depends on."""
    if not path.is_file():
        with atomic_writer(path) as file:
            file.write(draw())
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})")


def plot_loss_curve(records: Sequence[dict[str, Any]]) -> bytes:
    """Training and validation loss over tokens, with the learning rate below, as a PNG. records: lines of metrics.jsonl."""
    from matplotlib.ticker import EngFormatter

    train = [record for record in records if record["kind"] == "train" and record["loss"] is not None]
    validation = [record for record in records if record["kind"] == "eval" and record["val_loss"] is not None]
    figure, (loss, rate) = _figure(rows=2, heights=(5, 2))
    tokens = [record["tokens"] for record in train]
    loss.plot(tokens, [record["loss"] for record in train], color=_TRAIN, linewidth=0.6, alpha=0.35)
    loss.plot(tokens, _smoothed([record["loss"] for record in train]), color=_TRAIN, label="training")
    loss.plot(
        [record["tokens"] for record in validation],
        [record["val_loss"] for record in validation],
        color=_VALIDATION,
        marker="o",
        markersize=4,
        label=f"validation, {validation[-1]['val_loss']:.3f} at the end" if validation else "validation",
    )
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False, loc="upper right")
    rate.plot(tokens, [record["learning_rate"] for record in train], color=_BASELINE)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("training tokens")
    rate.xaxis.set_major_formatter(EngFormatter())
    return _png(figure)


def plot_bits_per_byte(values: dict[str, float]) -> bytes:
    """Horizontal bars of bits per byte, smaller is better, as a PNG. values: name -> bits per byte, in order from the top."""
    figure, (axes,) = _figure(rows=1, heights=(1,), height=0.9 + 0.5 * len(values))
    names = list(values)[::-1]
    colors = [_TRAIN if name == next(iter(values)) else _BASELINE for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colors)
    axes.grid(False, axis="y")
    axes.bar_label(bars, fmt="%.3f", padding=4)
    axes.set_xlabel("bits per byte of held-out text (smaller is better)")
    axes.margins(x=0.12)
    return _png(figure)


@dataclass(frozen=True)
class ComparedRun:
    """One run in the comparison."""

    name: str
    parameters: int
    bits_per_byte: float
    released: bool
    tokens: Sequence[int]
    losses: Sequence[float]


def plot_run_comparison(runs: Sequence[ComparedRun]) -> bytes:
    """Training loss over tokens, and bits per byte over model size, of at most ten runs, as a PNG."""
    from matplotlib import color_sequences
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, NullLocator

    sizes = EngFormatter(places=1)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    loss, size = figure.subplots(1, 2, width_ratios=(3, 2))
    for run, color in zip(runs, color_sequences["tab10"], strict=False):
        label = f"{run.name}, {sizes(run.parameters)}{', released' if run.released else ''}"
        loss.plot(run.tokens, run.losses, color=color, label=label)
        size.plot(
            run.parameters,
            run.bits_per_byte,
            color=color,
            marker="*" if run.released else "o",
            markersize=12 if run.released else 7,
        )
        size.annotate(run.name, (run.parameters, run.bits_per_byte), xytext=(7, 4), textcoords="offset points", fontsize=8)
    loss.set_xlabel("training tokens")
    loss.xaxis.set_major_formatter(EngFormatter())
    loss.set_ylabel("training loss (nats per token)")
    loss.legend(frameon=False, fontsize=8, loc="upper right")
    size.set_xlabel("parameters")
    size.set_xscale("log")
    size.set_xticks(_apart([run.parameters for run in runs]))
    size.xaxis.set_major_formatter(sizes)
    size.xaxis.set_minor_locator(NullLocator())
    size.set_ylabel("bits per byte (smaller is better)")
    size.margins(x=0.25, y=0.15)
    for axes in (loss, size):
        _plain(axes)
    return _png(figure)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Sizes whose labels fit side by side on a logarithmic axis."""
    kept: list[int] = []
    for size in sorted(sizes):
        if not kept or size > 1.3 * kept[-1]:
            kept.append(size)
    return kept


def _figure(rows: int, heights: Sequence[int], height: float = 4.2) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    # Figure instead of pyplot: no global state, safe in Dagster's threads.
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for subplot in axes:
        _plain(subplot)
    return figure, list(axes)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for the bias at the start."""
    smooth, mean, share = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        share = weight * share + (1 - weight)
        smooth.append(mean / share)
    return smooth


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
