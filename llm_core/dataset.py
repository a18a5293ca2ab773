"""Windows over the token shards of one split: index arithmetic on memory-mapped tokens, no copy and no index file."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_core.errors import UserError
from llm_core.loss import IGNORE_INDEX
from llm_core.order import Indices
from llm_core.parts import Parts, kept_runs
from llm_core.shards import DatasetManifest


class TokenStream:
    """The tokens of a split as one sequence: "eot document eot document ...", whatever shards they lie in."""

    def __init__(self, runs: Iterable[np.ndarray]) -> None:
        self._runs = list(runs)
        self._bounds = list(accumulate((run.size for run in self._runs), initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, fewer at the end of the stream; a view where they lie in one run."""
        stop = min(stop, len(self))
        first = bisect_right(self._bounds, start) - 1
        pieces = []
        while start < stop:
            begin, end = self._bounds[first], self._bounds[first + 1]
            pieces.append(self._runs[first][start - begin : min(stop, end) - begin])
            start, first = min(stop, end), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Windows:
    """Training examples of `max_length` inputs and their targets, each window `max_length - stride` tokens after the one before.

    Window i reads max_length + 1 tokens: the inputs and, shifted by one, the targets. The last target of a window is the first
    input of the next, so that with stride 0 every token but a stream's first is a target exactly once. The last window of a
    stream is filled up with end-of-text inputs whose targets are ignored. Where the text is a mixture, each part is a stream of
    its own and the windows are numbered through all of them.

    sizes: windows of each stream; 0 where it has too few tokens for one target.
    """

    def __init__(self, streams: Sequence[TokenStream], max_length: int, stride: int, eot_id: int) -> None:
        self.streams = list(streams)
        self.max_length = max_length
        self.stride = stride
        self.eot_id = eot_id
        self._step = max_length - stride
        self._targets = np.array([len(stream) - 1 for stream in streams])
        self.sizes = [max(1, -(-(int(targets) - stride) // self._step)) if targets > 0 else 0 for targets in self._targets]
        self._offsets = np.cumsum([0, *self.sizes])

    @classmethod
    def open(
        cls, data_dir: Path, manifest: DatasetManifest, split: str, max_length: int, stride: int, parts: Parts | None = None
    ) -> "Windows":
        """Opens and verifies the shards of one split, divided into `parts` where these are given.

        Raises:
            UserError: the split has too few tokens for one target.
            DataError: a shard is missing or damaged.
        """
        streams = [TokenStream(runs) for runs in kept_runs(data_dir, manifest, split, parts)]
        if max(len(stream) for stream in streams) < 2:
            raise UserError(
                f"{data_dir}: the {split} split has {sum(map(len, streams))} tokens; prepare more text or another --val_fraction"
            )
        return cls(streams, max_length, stride, manifest.tokenizer.eot_id)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def num_targets(self, windows: Indices) -> int:
        """How many targets these windows hold together, by arithmetic alone."""
        part, start = self._locate(windows)
        return int(np.minimum(self._targets[part] - start, self.max_length).sum())

    def batch(self, windows: Indices) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, each (len(windows), max_length), int64."""
        inputs = np.empty((len(windows), self.max_length), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, (part, start) in enumerate(zip(*(places.tolist() for places in self._locate(windows)), strict=True)):
            piece = self.streams[part].read(start, start + self.max_length + 1)
            known = piece.size - 1
            inputs[row, : known + 1] = piece[: self.max_length]
            targets[row, :known] = piece[1:]
            if known < self.max_length:
                inputs[row, known + 1 :] = self.eot_id
                targets[row, known:] = IGNORE_INDEX
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _locate(self, windows: Indices) -> tuple[Indices, Indices]:
        """The stream of each window and its first token there."""
        part = np.searchsorted(self._offsets, windows, side="right") - 1
        return part, (windows - self._offsets[part]) * self._step
