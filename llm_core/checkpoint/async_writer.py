"""Writes checkpoints in the background while training continues. Rank 0 only."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llm_core.checkpoint.records import CheckpointRecord
from llm_core.checkpoint.state import TrainingState, save_checkpoint


class CheckpointWriter:
    """Writes the checkpoints of a run folder, one at a time. Training waits only while the state is copied.

    All copies use the same CPU memory, as large as the state, which is allocated for the first one.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[CheckpointRecord] | None = None
        self._copy: Any = None

    def write(self, state: TrainingState, val_loss: float | None) -> CheckpointRecord:
        """Writes a checkpoint in the foreground. Raises as `save_checkpoint` does."""
        return save_checkpoint(self._run_dir, state, val_loss)

    def start(self, state: TrainingState, val_loss: float | None) -> None:
        """Copies the state and starts writing it. The previous checkpoint must have been waited for."""
        assert self._pending is None, "one checkpoint at a time"
        self._copy = copied(state, self._copy)
        self._pending = self._thread.submit(save_checkpoint, self._run_dir, cast(TrainingState, self._copy), val_loss)

    @property
    def error(self) -> Exception | None:
        """The error of the checkpoint in progress, if it has failed."""
        if self._pending is None or not self._pending.done():
            return None
        return cast(Exception | None, self._pending.exception())

    def collect(self) -> CheckpointRecord | None:
        """The checkpoint in progress if it is on disk now; each is returned once."""
        return self.wait() if self._pending is not None and self._pending.done() and self.error is None else None

    def wait(self) -> CheckpointRecord | None:
        """Waits for the checkpoint in progress and returns it; None if there is none. Raises as `save_checkpoint` does."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        """Waits for the checkpoint in progress to succeed or fail."""
        self._thread.shutdown()


def copied(value: Any, into: Any = None) -> Any:
    """The same value with its tensors copied to the CPU. into: an earlier copy, whose tensors are overwritten.

    A tensor with two names, such as a tied matrix, stays one tensor.
    """
    return _copied(value, into, {})


def _copied(value: Any, into: Any, copies: dict[tuple[int, torch.Size], Tensor]) -> Any:
    if isinstance(value, dict):
        named = into if isinstance(into, dict) else {}
        return {name: _copied(item, named.get(name), copies) for name, item in value.items()}
    if isinstance(value, list | tuple):
        earlier = into if isinstance(into, list | tuple) and len(into) == len(value) else [None] * len(value)
        return type(value)([_copied(item, before, copies) for item, before in zip(value, earlier, strict=True)])
    if not isinstance(value, Tensor):
        return value
    place = (value.data_ptr(), value.shape)
    if place not in copies:
        fits = isinstance(into, Tensor) and into.shape == value.shape and into.dtype == value.dtype
        copies[place] = (into if fits else torch.empty(value.shape, dtype=value.dtype)).copy_(value)
    return copies[place].detach()  # another tensor over the same memory, as in the original: both pickle alike
