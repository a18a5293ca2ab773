"""Windows over the token shards of one split: index arithmetic on their tokens, no copy and no index file."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_core.config import IGNORE_INDEX
from llm_core.dataset.groups import DocumentGroups, token_slices
from llm_core.dataset.manifest import DatasetManifest
from llm_core.dataset.sampler import Indices
from llm_core.dataset.shard import TokenSlice
from llm_core.errors import UserError
from llm_core.tokenizer import Tokenizer

# Tokens that a search holds in memory.
_READ_TOKENS = 1 << 20


class TokenStream:
    """The tokens of a split as one sequence over all shards: "eot document eot document ..."."""

    def __init__(self, slices: Iterable[TokenSlice]) -> None:
        self._slices = list(slices)
        self._bounds = list(accumulate((piece.size for piece in self._slices), initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, place: int) -> int:
        return int(self.read(place, place + 1)[0])

    def part(self, start: int, stop: int) -> "TokenStream":
        """Tokens start to stop - 1, without a copy."""
        first, last = bisect_right(self._bounds, start) - 1, bisect_left(self._bounds, stop)
        pieces = zip(self._slices[first:last], self._bounds[first:last], strict=True)
        return TokenStream(piece[max(0, start - begin) : stop - begin] for piece, begin in pieces)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, fewer at the end of the stream; a view if they are in one slice."""
        stop = min(stop, len(self))
        first = bisect_right(self._bounds, start) - 1
        pieces = []
        while start < stop:
            begin, end = self._bounds[first], self._bounds[first + 1]
            pieces.append(np.asarray(self._slices[first][start - begin : min(stop, end) - begin]))
            start, first = min(stop, end), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Windows:
    """Training examples of `max_length` inputs and targets; a window begins `max_length - stride` tokens after the previous one.

    A window reads max_length + 1 tokens: the inputs and, shifted by one, the targets. The last target of a window is the first
    input of the next, so that with stride 0 every token except the first of a stream is a target exactly once. The last window of
    a stream is padded with end-of-text inputs whose targets are ignored. In a mixture each group is a stream, and windows are
    numbered through all streams.

    sizes: number of windows of each stream; 0 if it has too few tokens for one target.
    """

    def __init__(self, streams: Sequence[TokenStream], max_length: int, stride: int, eot_id: int) -> None:
        self.streams = list(streams)
        self.max_length = max_length
        self.stride = stride
        self.eot_id = eot_id
        self._hop = max_length - stride
        self._targets = np.array([len(stream) - 1 for stream in streams])
        self.sizes = [max(1, -(-(int(targets) - stride) // self._hop)) if targets > 0 else 0 for targets in self._targets]
        self._offsets = np.cumsum([0, *self.sizes])
        self._stream_starts = np.cumsum([0, *map(len, streams)])

    @classmethod
    def open(
        cls,
        data_dir: Path,
        manifest: DatasetManifest,
        split: str,
        max_length: int,
        stride: int,
        groups: DocumentGroups | None = None,
    ) -> "Windows":
        """Opens and verifies the shards of one split, as one stream per group.

        Raises:
            UserError: the split has too few tokens for one target.
            DataError: a shard is missing or damaged.
        """
        return cls(open_streams(data_dir, manifest, split, groups), max_length, stride, manifest.tokenizer.eot_id)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def num_targets(self, windows: Indices) -> int:
        """Number of targets in these windows; reads nothing."""
        group, start = self._locate(windows)
        return int(np.minimum(self._targets[group] - start, self.max_length).sum())

    def batch(self, windows: Indices) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these windows, each (len(windows), max_length), int64."""
        inputs = np.empty((len(windows), self.max_length), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, (group, start) in enumerate(zip(*(places.tolist() for places in self._locate(windows)), strict=True)):
            piece = self.streams[group].read(start, start + self.max_length + 1)
            known = piece.size - 1
            inputs[row, : known + 1] = piece[: self.max_length]
            targets[row, :known] = piece[1:]
            if known < self.max_length:
                inputs[row, known + 1 :] = self.eot_id
                targets[row, known:] = IGNORE_INDEX
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def target_places(self, windows: Indices) -> Indices:
        """The place of each target, (len(windows), max_length), in the tokens of all streams one after the other.

        The places of ignored targets have no meaning.
        """
        group, start = self._locate(windows)
        return (self._stream_starts[group] + start)[:, None] + np.arange(1, self.max_length + 1)

    def _locate(self, windows: Indices) -> tuple[Indices, Indices]:
        """The stream of each window and its first token there."""
        group = np.searchsorted(self._offsets, windows, side="right") - 1
        return group, (windows - self._offsets[group]) * self._hop


def open_streams(
    data_dir: Path, manifest: DatasetManifest, split: str, groups: DocumentGroups | None = None
) -> list[TokenStream]:
    """The tokens of one split, as one stream per group; verifies the shards. Errors are those of `Windows.open`."""
    streams = [TokenStream(slices) for slices in token_slices(data_dir, manifest, split, groups)]
    if max(len(stream) for stream in streams) < 2:
        raise UserError(
            f"{data_dir}: the {split} split has {sum(map(len, streams))} tokens; prepare more text or another --val_fraction"
        )
    return streams


def token_bytes(tokenizer: Tokenizer, manifest: DatasetManifest) -> Tensor:
    """(V,) fp64: UTF-8 bytes of each token, 0 for special tokens.

    WordPiece tokens do not contain white space: there every token counts as the mean over the validation text.
    """
    sizes = torch.from_numpy(tokenizer.token_bytes()).double()
    if tokenizer.tokenizer_type == "wordpiece":
        val = manifest.splits["val"]
        sizes[sizes > 0] = val.bytes / max(1, val.tokens - val.documents)
    return sizes


def require_text(held_out: Windows, sizes: Tensor) -> None:
    """Raises UserError if no held-out token is text, since the loss per byte would be undefined. sizes: see `token_bytes`."""
    of_id = sizes.numpy()
    for stream in held_out.streams:
        for start in range(0, len(stream), _READ_TOKENS):
            if of_id[stream.read(start, start + _READ_TOKENS)].any():
                return
    raise UserError(
        "the validation text has only words that the tokenizer cannot spell; prepare the data again with --tokenizer_type bpe or"
        " with a larger --val_fraction"
    )
