"""Pictures for the asset pages, as markdown with the PNG inside."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import dagster as dg
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

_TRAIN, _VALIDATION, _BASELINE = "#4c72b0", "#dd8452", "#8c8c8c"


def loss_curve(records: Sequence[dict[str, Any]]) -> dg.MarkdownMetadataValue:
    """Training and validation loss over tokens, with the learning rate below. records: lines of metrics.jsonl."""
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
    return _markdown(figure, "loss curve")


def bits_per_byte_bars(values: dict[str, float]) -> dg.MarkdownMetadataValue:
    """Horizontal bars of bits per byte, smaller is better. values: name -> bits per byte, drawn in that order from the top."""
    figure, (axes,) = _figure(rows=1, heights=(1,), height=0.9 + 0.5 * len(values))
    names = list(values)[::-1]
    colors = [_TRAIN if name == next(iter(values)) else _BASELINE for name in names]
    bars = axes.barh(names, [values[name] for name in names], color=colors)
    axes.grid(False, axis="y")
    axes.bar_label(bars, fmt="%.3f", padding=4)
    axes.set_xlabel("bits per byte of held-out text (smaller is better)")
    axes.margins(x=0.12)
    return _markdown(figure, "bits per byte")


def _figure(rows: int, heights: Sequence[int], height: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
    # A figure of its own instead of pyplot: no global state, safe in Dagster's threads.
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=rows > 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
        part.grid(alpha=0.25)
        part.set_axisbelow(True)
    return figure, list(axes)


def _smoothed(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential mean with the start-up bias divided out."""
    smooth, mean, share = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        share = weight * share + (1 - weight)
        smooth.append(mean / share)
    return smooth


def _markdown(figure: Figure, title: str) -> dg.MarkdownMetadataValue:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})")
