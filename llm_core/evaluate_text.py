"""`python -m llm_core.evaluate_text`: evaluates a checkpoint on the held-out text of a dataset."""

import sys

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import time
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from llm_core.checkpoint import named_checkpoint
from llm_core.cli import parse_options, printable, run_tool
from llm_core.config import EvaluateConfig
from llm_core.evaluation import by_source
from llm_core.evaluation.evaluator import evaluate_checkpoint
from llm_core.system import leave_pandas_out

PROG = "python -m llm_core.evaluate_text"


class EvaluateTextOptions(EvaluateConfig):
    """Evaluate a checkpoint on the held-out text of a dataset."""

    checkpoint: str = Field(
        description="A checkpoint_step_<N>.pt file, or a run folder for its newest; the result is written beside it."
    )
    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    dataset_id: str | None = Field(
        None, description="Evaluate on this dataset version, from manifests/; default: the current one."
    )
    snapshot_id: str | None = Field(
        None, description="With dataset_id: the snapshot with the sources of its documents; default: the one it was made from."
    )


class Progress:
    """Shows how much is evaluated and the time left: as a bar on a terminal, elsewhere as a line every few seconds."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = 0.1 if sys.stderr.isatty() else seconds
        self._start, self._end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
        self._began = self._shown = time.monotonic()

    def __call__(self, done: int, windows: int) -> None:
        now = time.monotonic()
        if not done:  # loading the model does not count
            self._began = self._shown = now
        if now - self._shown >= self._seconds:
            self._shown = now
            line = tqdm.format_meter(done, windows, now - self._began, prefix="evaluating", unit=" windows")
            print(self._start + line, end=self._end, file=sys.stderr, flush=True)
        if done == windows:  # nothing of the bar stays in front of the results
            print(self._start, end="", file=sys.stderr, flush=True)


def main() -> None:
    leave_pandas_out()
    options = parse_options(EvaluateTextOptions, PROG)
    result = evaluate_checkpoint(
        named_checkpoint(options.checkpoint),
        Path(options.data_dir),
        options.stage(EvaluateConfig),
        options.dataset_id,
        options.snapshot_id,
        Progress(),
    )
    for entry in result["metrics"]:
        if entry["source"] == "all":
            counts = entry["metric"] in ("tokens", "bytes")
            print(f"{entry['metric']:<22} {entry['value']:,.{0 if counts else 4}f}")
    if table := by_source(result):
        print(f"\n{'source':<22} {'bits per byte':>13} {'loss':>8} {'bytes':>14}")
        for row in table:
            print(f"{printable(row['source']):<22} {row['bits_per_byte']:13.4f} {row['loss']:8.4f} {row['bytes']:14,.0f}")
    for sample in result["samples"]:
        print("\n" + printable(sample["prompt"] + sample["continuation"], keep="\n\t"))


if __name__ == "__main__":
    run_tool(main, PROG, "no result was written; run it again to evaluate")
