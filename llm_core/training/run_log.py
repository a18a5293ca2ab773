"""The records of a run while it trains: metrics.jsonl, run.json, console and callback. Rank 0 only."""

import json
import math
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NoReturn

from tqdm import tqdm

from llm_core.checkpoint import CheckpointRecord, RunRecord, intact_checkpoints
from llm_core.errors import DataError, UserError
from llm_core.layout import RunFolder
from llm_core.system import atomic_writer, explain_disk_full, held, now

MetricsLine = dict[str, Any]
Callback = Callable[[MetricsLine], None]


class RunLog:
    """Locks a run folder and writes its metrics and its record, until `close`.

    metrics.jsonl has one JSON object per line, with `kind` "train" for each optimizer step, "eval" for each validation and
    "checkpoint" for each checkpoint saved, pruned ones included. run.json is replaced atomically at each change.
    """

    def __init__(self, run_dir: Path, callback: Callback | None = None) -> None:
        self.run_dir = run_dir
        self._callback = callback
        self._lock = ExitStack()
        self._lock.enter_context(held(run_dir, self._refuse))
        for unfinished in run_dir.glob(".*.tmp"):  # written by a killed process
            unfinished.unlink(missing_ok=True)
        self._run: RunRecord | None = None
        self._metrics: IO[bytes] | None = None
        self._bar: tqdm[NoReturn] | None = None

    def _refuse(self, holder: str) -> NoReturn:
        raise UserError(f"--save_dir {self.run_dir}: another training (process {holder}) is writing here; wait for it or stop it")

    def begin(self, run: RunRecord, step: int) -> None:
        """Starts or resumes the run at `step`: metrics of later steps are dropped, as they will be written again."""
        path = RunFolder(self.run_dir).metrics
        kept = self._drop_after(path, step) if path.exists() else []
        recorded = {line["checkpoint_id"] for line in kept if line["kind"] == "checkpoint"}
        self._metrics = open(path, "ab")
        self._run = run
        run.write(self.run_dir)
        for checkpoint in reversed(intact_checkpoints(self.run_dir)):
            if checkpoint.checkpoint_id not in recorded:  # killed between the checkpoint and its line
                self.record_checkpoint(checkpoint)

    def _drop_after(self, path: Path, step: int) -> list[MetricsLine]:
        """Rewrites the metrics without the lines after `step`, and returns the lines kept."""
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        with atomic_writer(path) as file:
            file.write(b"".join(_encode(line) for line in kept))
        trained = {line["step"] for line in kept if line["kind"] == "train"}
        # A run that was resumed in a new folder has no lines of the steps before that.
        if lost := set(range(min(trained, default=1), step + 1)) - trained:
            self.log(
                f"{path}: the metrics of {len(lost)} earlier steps are missing, the first of them is step {min(lost)}; "
                "the training itself is not affected"
            )
        return kept

    def update(self, **changes: Any) -> None:
        """Changes fields of run.json."""
        assert self._run is not None, "update before begin"
        self._run = self._run.model_copy(update=changes)
        self._run.write(self.run_dir)

    def fail(self, error: Exception) -> None:
        """Marks the run as failed, if it had begun."""
        if self._run is not None:
            self.update(status="failed", error=str(error), finished_at=now())

    def record(self, line: MetricsLine) -> None:
        """Appends a line to metrics.jsonl and passes it to the callback; numbers that are not finite become null, as in JSON."""
        line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        if self._metrics is not None:
            encoded = _encode(line | {"time": now()})
            with explain_disk_full(RunFolder(self.run_dir).metrics, len(encoded)):
                self._metrics.write(encoded)
                self._metrics.flush()
        if self._callback is not None:
            self._callback(line)

    def sync(self) -> None:
        """Flushes metrics.jsonl to disk: a checkpoint must not survive a crash that loses the metrics of its steps."""
        if self._metrics is not None:
            with explain_disk_full(RunFolder(self.run_dir).metrics, 1):
                os.fsync(self._metrics.fileno())

    def record_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        self.record({"kind": "checkpoint"} | checkpoint.fields())

    def log(self, text: str) -> None:
        """Prints a line to the console, above the progress bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def progress(self, step: int, last_step: int, text: str, due: bool) -> None:
        """Advances the bar on a terminal; elsewhere prints a line if it is `due`."""
        if not sys.stderr.isatty():
            if due:
                self.log(f"step {step}/{last_step} | {text}")
            return
        if self._bar is None:
            self._bar = tqdm(total=last_step, initial=step - 1, unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        self._lock.close()


def read_metrics(path: Path) -> list[MetricsLine]:
    """The lines of metrics.jsonl, without a last line that a killed process did not complete.

    Raises:
        DataError: a line is damaged.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_decode(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]


# Each line ends with its CRC-32: without it, 206 of 1,000 random single-bit flips left JSON with the same keys.
_CRC_FIELD = b', "crc32": "'


def _encode(line: MetricsLine) -> bytes:
    return _with_crc(json.dumps(line).encode().removesuffix(b"}")) + b"\n"


def _with_crc(fields: bytes) -> bytes:
    """fields: a JSON object without its closing brace."""
    return fields + _CRC_FIELD + b'%08x"}' % zlib.crc32(fields)


def _decode(encoded: bytes, place: str) -> MetricsLine:
    """Inverse of `_encode`; lines of older versions have no CRC."""
    fields, crc, _ = encoded.rpartition(_CRC_FIELD)
    try:
        if crc and encoded != _with_crc(fields):
            raise ValueError("it does not match its checksum")
        line: MetricsLine = json.loads(fields + b"}" if crc else encoded)
        if not isinstance(line["step"], int) or not isinstance(line["kind"], str):
            raise ValueError("it has no kind or step")
        return line
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}); delete that line to continue without it") from None
