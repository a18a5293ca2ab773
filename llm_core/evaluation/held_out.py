"""Loss, perplexity and bits per byte on held-out text."""

import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_core.config import IGNORE_INDEX
from llm_core.dataset import Numbers
from llm_core.dataset.windows import TokenStream, Windows
from llm_core.distributed.ranks import Ranks
from llm_core.model.precision import Precision, autocast
from llm_core.model.transformer import Transformer
from llm_core.tokenizer import Ids

# xz compresses about a megabyte per second.
XZ_BYTES = 16 << 20

Sums = npt.NDArray[np.float64]

_FIRST_WINDOW = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Sums over the targets of held-out text. Special tokens count in the loss but not as text."""

    nll: float  # nats over all targets
    targets: int
    text_nll: float  # nats over the targets that are text
    text_bytes: float  # UTF-8 bytes of that text

    @classmethod
    def of(cls, sums: Sequence[float]) -> "HeldOut":
        """From the four sums in the order of the fields."""
        nll, targets, text_nll, text_bytes = sums
        return cls(float(nll), int(targets), float(text_nll), float(text_bytes))

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return self.nll / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """nats / (ln 2 * bytes) of the predicted text: comparable between tokenizers; NaN if none of the targets is text."""
        return self.text_nll / (math.log(2) * self.text_bytes) if self.text_bytes else math.nan


def evaluate(
    model: Transformer, windows: Windows, token_bytes: Tensor, *, batch_size: int, ranks: Ranks, precision: Precision = "fp32"
) -> HeldOut:
    """Runs the model over `windows`, which are divided among the ranks.

    token_bytes: (V,) fp64, UTF-8 bytes of each token, 0 for special tokens.
    The model's mode and the random state are unchanged afterwards.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for _, nll, valid, size in _scores(model, windows, token_bytes, batch_size, ranks, precision):
        sums += torch.stack((nll.sum(), valid.sum().double(), nll[size > 0].sum(), size.sum()))
    return HeldOut.of(ranks.sum(sums).tolist())


def evaluate_pieces(
    model: Transformer,
    windows: Windows,
    token_bytes: Tensor,
    sizes: Numbers,
    *,
    batch_size: int,
    ranks: Ranks,
    precision: Precision = "fp32",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sums:
    """`evaluate`, with the sums over each piece of the text, (pieces, 4), as `HeldOut.of` takes them.

    sizes: (pieces,) tokens of each piece of the streams, in order. on_progress: gets the number of windows done and of all.
    """
    starts = np.cumsum(sizes) - sizes
    sums = torch.zeros(len(sizes), 4, dtype=torch.float64, device=ranks.device)
    done = 0
    on_progress(done, len(windows))
    for rows, nll, valid, size in _scores(model, windows, token_bytes, batch_size, ranks, precision):
        places = windows.target_places(rows if len(rows) else _FIRST_WINDOW)
        piece = torch.from_numpy(np.searchsorted(starts, places, side="right") - 1).to(ranks.device)
        per_target = torch.stack((nll, valid.double(), nll * (size > 0), size), dim=-1)
        sums.index_add_(0, piece.flatten(), per_target.flatten(0, 1))
        done += len(rows) * ranks.world_size
        on_progress(min(done, len(windows)), len(windows))
    return ranks.sum(sums).cpu().numpy()


def _scores(
    model: Transformer, windows: Windows, token_bytes: Tensor, batch_size: int, ranks: Ranks, precision: Precision
) -> Iterator[tuple[Numbers, Tensor, Tensor, Tensor]]:
    """The windows of each forward pass of this rank, and what `_score` gives for them."""
    token_bytes = token_bytes.to(ranks.device)
    with _evaluation_mode(model):
        for rows in _batches_of_rank(len(windows), batch_size, ranks):
            yield rows, *_score(model, windows, rows, token_bytes, precision, ranks)


@contextmanager
def _evaluation_mode(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _score(
    model: Transformer, windows: Windows, rows: Numbers, token_bytes: Tensor, precision: Precision, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL in nats, whether it counts, and the bytes of each target of these windows, (windows, max_length).

    Without windows the model still runs, and no target counts: with FSDP each forward pass is a collective.
    """
    inputs, targets = (t.to(ranks.device) for t in windows.batch(rows if len(rows) else _FIRST_WINDOW))
    if not len(rows):
        targets.fill_(IGNORE_INDEX)
    with autocast(precision, ranks.device):
        nll = model(inputs, targets, per_token=True).double()
    valid = targets != IGNORE_INDEX
    return nll, valid, token_bytes[targets.clamp(min=0)] * valid


def _batches_of_rank(count: int, batch_size: int, ranks: Ranks) -> Iterator[Numbers]:
    """The windows of each forward pass of this rank, out of `count`.

    Every rank makes the same number of passes; the last ones may have no window.
    """
    mine = np.arange(count, dtype=np.int64)[ranks.rank :: ranks.world_size]
    for start in range(0, -(-count // ranks.world_size), batch_size):
        yield mine[start : start + batch_size]


def xz_bits_per_byte(text: bytes) -> float:
    """A strong compressor on the same text: xz at its highest setting on the first `XZ_BYTES` bytes; NaN without text."""
    if not text:
        return math.nan
    text = text[:XZ_BYTES]
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def unigram_baseline(train: TokenStream, targets: Ids, token_bytes: Tensor, count_tokens: int = 1 << 26) -> HeldOut:
    """Targets [targets] predicted by token frequencies, add-one smoothed, of the first `count_tokens` training tokens."""
    counts = np.bincount(train.read(0, count_tokens), minlength=len(token_bytes)).astype(np.float64) + 1
    cost = -np.log(counts / counts.sum())
    nll, size = cost[targets], token_bytes.numpy()[targets]
    return HeldOut(float(nll.sum()), len(targets), float(nll[size > 0].sum()), float(size.sum()))
