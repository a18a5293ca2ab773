"""What a run tells about itself: metrics.jsonl, run.json, console lines and an optional listener. Main rank only."""

import datetime
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

from llm_core.checkpoint_files import CheckpointRecord, sound_records
from llm_core.errors import DataError, UserError
from llm_core.files import atomic_writer, says_when_the_disk_is_full, write_json
from llm_core.locks import held

Record = dict[str, Any]
Listener = Callable[[Record], None]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


class RunLog:
    """Owns one run directory while it lives: the lock, the metrics and the state file.

    metrics.jsonl holds one JSON object a line, `kind` "train" for each optimizer step, "eval" for each validation,
    "checkpoint" for each one saved, whether retention keeps it or not.
    run.json says what the run is and how it stands; it is rewritten whole at every change of state.
    """

    def __init__(self, run_dir: Path, listener: Listener | None = None) -> None:
        self.run_dir = run_dir
        self._listener = listener
        self._lock = ExitStack()
        self._lock.enter_context(held(run_dir, self._refuse))
        for left_behind in run_dir.glob(".*.tmp"):  # by a process that was killed while it wrote; nobody else writes here now
            left_behind.unlink(missing_ok=True)
        self._state: Record = {}
        self._metrics: IO[bytes] | None = None
        self._bar: tqdm[NoReturn] | None = None

    def _refuse(self, holder: str) -> NoReturn:
        raise UserError(f"--save_dir {self.run_dir}: another training (process {holder}) is writing here; wait for it or stop it")

    def begin(self, state: Record, step: int) -> None:
        """Starts at `step`: lines of later steps, written before an interruption, are dropped, since they will come again."""
        path = self.run_dir / "metrics.jsonl"
        kept = self._drop_after(path, step) if path.exists() else []
        told = {record["checkpoint_id"] for record in kept if record["kind"] == "checkpoint"}
        self._metrics = open(path, "ab")
        self.update(state)
        for checkpoint in reversed(sound_records(self.run_dir)):
            if checkpoint.checkpoint_id not in told:  # killed between the checkpoint and its line
                self.record_checkpoint(checkpoint)

    def _drop_after(self, path: Path, step: int) -> list[Record]:
        """Rewrites the log without its later lines, and returns those that stay."""
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        with atomic_writer(path) as file:
            file.write(b"".join(_sealed(record) for record in kept))
        trained = {record["step"] for record in kept if record["kind"] == "train"}
        # One that goes on in a new folder has no lines from before that.
        if lost := set(range(min(trained, default=1), step + 1)) - trained:
            self.say(
                f"{path}: {len(lost)} of the steps before this one have no line in it, the first of them is step {min(lost)}; "
                "what they logged is lost, what they trained is not"
            )
        return kept

    def update(self, changes: Record) -> None:
        """Changes fields of run.json."""
        self._state |= changes
        write_json(self.run_dir / "run.json", self._state)

    def fail(self, error: Exception) -> None:
        """Marks the run as failed, if it had begun."""
        if self._state:
            self.update({"status": "failed", "error": str(error), "finished_at": now()})

    def record(self, record: Record) -> None:
        """Appends one line to metrics.jsonl and hands it to the listener; what is not finite becomes null, as JSON has no NaN."""
        record = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}
        if self._metrics is not None:
            line = _sealed(record | {"time": now()})
            with says_when_the_disk_is_full(self.run_dir / "metrics.jsonl", len(line)):
                self._metrics.write(line)
                self._metrics.flush()
        if self._listener is not None:
            self._listener(record)

    def sync(self) -> None:
        """Returns when the lines so far are on disk: no checkpoint may outlive those of its own steps."""
        if self._metrics is not None:
            with says_when_the_disk_is_full(self.run_dir / "metrics.jsonl", 1):
                os.fsync(self._metrics.fileno())

    def record_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        self.record({"kind": "checkpoint"} | {name: value for name, value in vars(checkpoint).items() if name != "path"})

    def say(self, text: str) -> None:
        """A line for the console; on a terminal it stands above the progress bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def progress(self, step: int, last_step: int, text: str, due: bool) -> None:
        """A bar on a terminal, moved at every step; elsewhere a line at those that are `due`."""
        if not sys.stderr.isatty():
            if due:
                self.say(f"step {step}/{last_step} | {text}")
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


def read_metrics(path: Path) -> list[Record]:
    """The lines of metrics.jsonl; a last line that a killed process left torn is not one.

    Raises:
        DataError: a line is not as it was written.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    return [_opened(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]


_SEAL = b', "crc32": "'


def _sealed(record: Record) -> bytes:
    """A line of metrics.jsonl. Its last field is the CRC-32 of what stands before it: a flipped bit can leave readable JSON."""
    return _with_seal(json.dumps(record)[:-1].encode()) + b"\n"


def _with_seal(content: bytes) -> bytes:
    """A line without its end; content: the JSON object without its closing brace."""
    return content + _SEAL + b'%08x"}' % zlib.crc32(content)


def _opened(line: bytes, place: str) -> Record:
    """What `_sealed` made a line of; lines of older versions have no seal."""
    content, seal, _ = line.rpartition(_SEAL)
    try:
        if seal and line != _with_seal(content):
            raise ValueError("it does not match its own checksum")
        record: Record = json.loads(content + b"}" if seal else line)
        if not isinstance(record["step"], int) or not isinstance(record["kind"], str):
            raise ValueError("no kind or step in it")
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}); delete that line to go on without it") from None
