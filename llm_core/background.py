"""Checkpoints that are written while the training goes on. Main rank only."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llm_core.checkpoint import TrainingState, save_checkpoint
from llm_core.checkpoint_files import CheckpointRecord


class CheckpointWriter:
    """Writes the checkpoints of one run directory, one at a time: the training waits for a copy of the state, a thread writes it.

    The copies of all checkpoints share one piece of CPU memory, as large as the state, which is taken at the first.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[CheckpointRecord] | None = None
        self._copy: Any = None

    def write(self, state: TrainingState, val_loss: float | None) -> CheckpointRecord:
        """Writes a checkpoint here and now. Raises as `save_checkpoint` does."""
        return save_checkpoint(self._run_dir, state, val_loss)

    def start(self, state: TrainingState, val_loss: float | None) -> None:
        """Copies the state and begins to write it; the one before must have been waited for."""
        assert self._pending is None, "one checkpoint at a time"
        self._copy = copied(state, self._copy)
        self._pending = self._thread.submit(save_checkpoint, self._run_dir, cast(TrainingState, self._copy), val_loss)

    @property
    def error(self) -> Exception | None:
        """Why the checkpoint begun last could not be written, if that is known by now."""
        if self._pending is None or not self._pending.done():
            return None
        return cast(Exception | None, self._pending.exception())

    def collect(self) -> CheckpointRecord | None:
        """The checkpoint begun last, once, if it is on disk by now."""
        return self.wait() if self._pending is not None and self._pending.done() and self.error is None else None

    def wait(self) -> CheckpointRecord | None:
        """The checkpoint begun last when it is on disk; None where none is being written. Raises as `save_checkpoint` does."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        """Lets the checkpoint that is being written come to its end, whatever that is."""
        self._thread.shutdown()


def copied(value: Any, into: Any = None) -> Any:
    """The same value with its tensors copied to the CPU; into: an earlier copy, whose tensors are written over.

    What was one tensor under two names, as a tied matrix is, stays one.
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
    return copies[place].detach()  # a tensor of its own over the same memory, as it is in the value: both pickle alike
