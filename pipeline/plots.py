"""Pictures for the asset pages: PNG files beside what they show, and as markdown with the PNG inside.

matplotlib is loaded where something is drawn: a run that only reuses what is there does without and starts half a second faster.
"""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from llm_core.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VALIDATION, _BASELINE = "#4c72b0", "#dd8452", "#8c8c8c"


def picture(path: Path, title: str, draw: Callable[[], bytes]) -> dg.MarkdownMetadataValue:
    """The PNG at `path`, drawn only where there is none yet: the path names all that the picture depends on."""
    if not path.is_file():
        with atomic_writer(path) as file:
            file.write(draw())
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})")


def loss_curve(records: Sequence[dict[str, Any]]) -> bytes:
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


def bits_per_byte_bars(values: dict[str, float]) -> bytes:
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


def _figure(rows: int, heights: Sequence[int], height: float = 4.2) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

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


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
