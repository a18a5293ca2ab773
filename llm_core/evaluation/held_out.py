"""Loss, perplexity and bits per byte on held-out text."""

import lzma
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_core.config import IGNORE_INDEX
from llm_core.dataset import Numbers
from llm_core.dataset.windows import TokenStream, Windows
from llm_core.distributed.ranks import Ranks
from llm_core.model.precision import Precision, autocast
from llm_core.model.transformer import Transformer
from llm_core.tokenizer import Ids, Tokenizer

# xz compresses about a megabyte per second.
XZ_BYTES = 16 << 20

FIRST_WINDOW = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Sums over the targets of held-out text. Special tokens count in the loss but not as text."""

    nll: float  # nats over all targets
    targets: int
    text_nll: float  # nats over the targets that are text
    text_bytes: float  # UTF-8 bytes of that text

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
    model: Transformer,
    windows: Windows,
    token_bytes: Tensor,
    *,
    max_tokens: int,
    batch_size: int,
    ranks: Ranks,
    precision: Precision = "fp32",
) -> HeldOut:
    """Runs the model over the first `max_tokens` tokens of `windows` (0: all), with the windows divided among the ranks.

    token_bytes: (V,) fp64, UTF-8 bytes of each token, 0 for special tokens.
    The model's mode and the random state are unchanged afterwards.
    """
    return evaluate_groups(
        model, windows, token_bytes, max_tokens=max_tokens, batch_size=batch_size, ranks=ranks, precision=precision
    )[0]


def evaluate_groups(
    model: Transformer,
    windows: Windows,
    token_bytes: Tensor,
    group_of_token: Numbers | None = None,
    groups: int = 0,
    *,
    max_tokens: int,
    batch_size: int,
    ranks: Ranks,
    precision: Precision = "fp32",
) -> list[HeldOut]:
    """`evaluate`, and in the same pass the sums over each of `groups` groups: first all text, then the groups.

    group_of_token: [tokens] the group of each token of the stream; an end-of-text token belongs to the document it begins.
    The windows are those of one stream, without overlap.
    """
    count = len(windows) if max_tokens == 0 else min(len(windows), -(-max_tokens // windows.max_length))
    token_bytes = token_bytes.to(ranks.device)
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    group_sums = torch.zeros(groups, 4, dtype=torch.float64, device=ranks.device)
    with _evaluation_mode(model):
        for rows in _batches_of_rank(count, batch_size, ranks):
            nll, valid, size = _score(model, windows, rows, token_bytes, precision, ranks)
            sums += torch.stack((nll.sum(), valid.sum().double(), nll[size > 0].sum(), size.sum()))
            if group_of_token is not None and len(rows):
                group = torch.from_numpy(group_of_token[_positions_of_targets(rows, windows, len(group_of_token))])
                per_target = torch.stack((nll, valid.double(), nll * (size > 0), size), dim=-1)
                group_sums.index_add_(0, group.to(ranks.device).flatten(), per_target.flatten(0, 1))
    all_sums = [ranks.sum(sums), *(ranks.sum(group_sums) if groups else ())]
    return [HeldOut(nll, int(targets), text_nll, size) for nll, targets, text_nll, size in (row.tolist() for row in all_sums)]


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
    inputs, targets = (t.to(ranks.device) for t in windows.batch(rows if len(rows) else FIRST_WINDOW))
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


def _positions_of_targets(rows: Numbers, windows: Windows, tokens: int) -> Numbers:
    """The position of each target of these windows in a stream of `tokens` tokens, (windows, max_length)."""
    positions: Numbers = rows[:, None] * windows.max_length + np.arange(1, windows.max_length + 1)
    return positions.clip(max=tokens - 1)


def targets_read(windows: Windows, max_tokens: int) -> Ids:
    """The targets [targets] that `evaluate` reads, in the order of the text."""
    (stream,) = windows.streams
    stop = len(stream) if max_tokens == 0 else -(-max_tokens // windows.max_length) * windows.max_length + 1
    return stream.read(1, stop)


def reencoded(windows: Windows, tokenizer: Tokenizer, other: Tokenizer, max_tokens: int) -> tuple[Windows, Numbers]:
    """The text that `evaluate` reads, in the tokens of another byte-level tokenizer: windows of the same length, and the number
    of tokens of each document, end-of-text included.

    windows: of one stream, in the tokens of `tokenizer`. A character that the limit cuts in two becomes U+FFFD.
    """
    (stream,) = windows.streams
    ids = np.append(stream.read(0, 1), targets_read(windows, max_tokens))
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot_id))[1:]
    begin = np.array([other.eot_id], dtype=other.dtype)
    slices = [np.append(begin, ids) for ids in other.encode_batch([tokenizer.decode(document[1:]) for document in documents])]
    return Windows([TokenStream(slices)], windows.max_length, 0, other.eot_id), np.array([piece.size for piece in slices])


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
