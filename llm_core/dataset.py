"""Windows over the token shards of one split: index arithmetic on memory-mapped tokens, no copy and no index file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_core.errors import UserError
from llm_core.loss import IGNORE_INDEX
from llm_core.order import Indices
from llm_core.shards import DatasetManifest, kept_runs


class TokenStream:
    """The tokens of a split as one sequence: "eot document eot document ...", whatever shards they lie in."""

    def __init__(self, runs: Iterable[np.ndarray]) -> None:
        self._runs = list(runs)
        self._bounds = np.cumsum([0, *(run.size for run in self._runs)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, fewer at the end of the stream; a view where they lie in one run."""
        stop = min(stop, len(self))
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        pieces = []
        while start < stop:
            begin, end = self._bounds[first], self._bounds[first + 1]
            pieces.append(self._runs[first][start - begin : min(stop, end) - begin])
            start, first = min(stop, int(end)), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Windows:
    """Training examples of `max_length` inputs and their targets, each window `max_length - stride` tokens after the one before.

    Window i reads max_length + 1 tokens: the inputs and, shifted by one, the targets. The last target of a window is the first
    input of the next, so that with stride 0 every token but the stream's first is a target exactly once. The last
    window is filled up with end-of-text inputs whose targets are ignored.
    """

    def __init__(self, stream: TokenStream, max_length: int, stride: int, eot_id: int) -> None:
        self.stream = stream
        self.max_length = max_length
        self.stride = stride
        self.eot_id = eot_id
        self._step = max_length - stride

    @classmethod
    def open(cls, data_dir: Path, manifest: DatasetManifest, split: str, max_length: int, stride: int) -> "Windows":
        """Opens and verifies the shards of one split.

        Raises:
            UserError: the split has too few tokens for one target.
            DataError: a shard is missing or damaged.
        """
        stream = TokenStream(kept_runs(data_dir, manifest, split))
        if len(stream) < 2:
            raise UserError(
                f"{data_dir}: the {split} split has {len(stream)} tokens; prepare more text or another --val_fraction"
            )
        return cls(stream, max_length, stride, manifest.tokenizer.eot_id)

    def __len__(self) -> int:
        targets = len(self.stream) - 1
        return max(1, -(-(targets - self.stride) // self._step))

    def num_targets(self, windows: Indices) -> int:
        """How many targets these windows hold together, by arithmetic alone."""
        left = len(self.stream) - 1 - windows * self._step
        return int(np.minimum(left, self.max_length).sum())

    def batch(self, windows: Indices) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, each (len(windows), max_length), int64."""
        tokens = np.full((len(windows), self.max_length + 1), self.eot_id, dtype=np.int64)
        lengths = np.empty(len(windows), dtype=np.int64)
        for row, window in enumerate(windows):
            start = int(window) * self._step
            piece = self.stream.read(start, start + self.max_length + 1)
            tokens[row, : piece.size] = piece
            lengths[row] = piece.size
        inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
        targets[np.arange(1, self.max_length + 1) >= lengths[:, None]] = IGNORE_INDEX
        return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(targets)
