"""Held-out loss, perplexity and bits per byte."""

import lzma
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_core.dataset import TokenStream, Windows
from llm_core.distributed import Ranks
from llm_core.loss import IGNORE_INDEX
from llm_core.model import Transformer
from llm_core.parts import Numbers
from llm_core.precision import Precision, autocast
from llm_core.shards import DatasetManifest
from llm_core.tokenizer import Ids, Tokenizer

XZ_BYTES = 16 << 20
"""It compresses about a megabyte per second."""

FIRST_WINDOW = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Sums over the targets of a held-out text; special tokens count as targets of the loss but not as text."""

    nll: float  # nats over all targets
    targets: int
    text_nll: float  # nats over the targets that stand for text
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
        """nats / (ln 2 * bytes) of the predicted text: comparable between tokenizers."""
        return self.text_nll / (math.log(2) * self.text_bytes)


def token_bytes(tokenizer: Tokenizer, manifest: DatasetManifest) -> Tensor:
    """(V,) fp64: UTF-8 bytes that each token stands for, 0 for special ones.

    A WordPiece token does not know the white space before it, so there every token stands for the mean of the validation text.
    """
    sizes = torch.from_numpy(tokenizer.token_bytes()).double()
    if tokenizer.tokenizer_type == "wordpiece":
        val = manifest.splits["val"]
        sizes[sizes > 0] = val.bytes / (val.tokens - val.documents)
    return sizes


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
    """Runs the model over the first `max_tokens` tokens of `windows` (0: all), the windows shared out among the ranks.

    token_bytes: (V,) fp64, UTF-8 bytes that each token stands for, 0 for special tokens.
    Leaves the model's mode and the random state as they were.
    """
    return evaluate_parts(
        model, windows, token_bytes, max_tokens=max_tokens, batch_size=batch_size, ranks=ranks, precision=precision
    )[0]


def evaluate_parts(
    model: Transformer,
    windows: Windows,
    token_bytes: Tensor,
    part_of_token: Numbers | None = None,
    parts: int = 0,
    *,
    max_tokens: int,
    batch_size: int,
    ranks: Ranks,
    precision: Precision = "fp32",
) -> list[HeldOut]:
    """`evaluate`, and in the same pass the sums over each of `parts` parts of the text: the whole first, then the parts.

    part_of_token: [tokens] the part that each token of the stream belongs to, end-of-text to the document that it begins.
    The windows are those of one stream, without overlap.
    """
    count = len(windows) if max_tokens == 0 else min(len(windows), -(-max_tokens // windows.max_length))
    mine = np.arange(count, dtype=np.int64)[ranks.rank :: ranks.world_size]
    longest_share = -(-count // ranks.world_size)
    token_bytes = token_bytes.to(ranks.device)
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    part_sums = torch.zeros(parts, 4, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # As many passes on every rank, since with FSDP each of them is a collective; one without windows counts nothing.
            for start in range(0, longest_share, batch_size):
                rows = mine[start : start + batch_size]
                inputs, targets = (t.to(ranks.device) for t in windows.batch(rows if len(rows) else FIRST_WINDOW))
                if not len(rows):
                    targets.fill_(IGNORE_INDEX)
                with autocast(precision, ranks.device):
                    nll = model(inputs, targets, per_token=True).double()
                valid = targets != IGNORE_INDEX
                size = token_bytes[targets.clamp(min=0)] * valid
                sums += torch.stack((nll.sum(), valid.sum().double(), nll[size > 0].sum(), size.sum()))
                if part_of_token is not None and len(rows):
                    place = (rows[:, None] * windows.max_length + np.arange(1, windows.max_length + 1)).clip(
                        max=len(part_of_token) - 1
                    )
                    part = torch.from_numpy(part_of_token[place]).to(ranks.device)
                    each = torch.stack((nll, valid.double(), nll * (size > 0), size), dim=-1)
                    part_sums.index_add_(0, part.flatten(), each.flatten(0, 1))
    finally:
        model.train(was_training)
    rows_of_sums = [ranks.sum(sums), *(ranks.sum(part_sums) if parts else ())]
    return [HeldOut(nll, int(count), text_nll, size) for nll, count, text_nll, size in (row.tolist() for row in rows_of_sums)]


def targets_read(windows: Windows, max_tokens: int) -> Ids:
    """The targets [targets] that `evaluate` reads, in the order of the text."""
    (stream,) = windows.streams
    stop = len(stream) if max_tokens == 0 else -(-max_tokens // windows.max_length) * windows.max_length + 1
    return stream.read(1, stop)


def reencoded(windows: Windows, tokenizer: Tokenizer, other: Tokenizer, max_tokens: int) -> tuple[Windows, Numbers]:
    """The text that `evaluate` reads, in the tokens of another byte-level tokenizer: windows of as many tokens, and the tokens of
    each document, end-of-text included.

    windows: of one stream, in the tokens of `tokenizer`. A character that the budget cuts in two becomes U+FFFD.
    """
    (stream,) = windows.streams
    ids = np.append(stream.read(0, 1), targets_read(windows, max_tokens))
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eot_id))[1:]
    begin = np.array([other.eot_id], dtype=other.dtype)
    runs = [np.append(begin, found) for found in other.encode_batch([tokenizer.decode(document[1:]) for document in documents])]
    return Windows([TokenStream(runs)], windows.max_length, 0, other.eot_id), np.array([run.size for run in runs])


def xz_bits_per_byte(text: bytes) -> float:
    """What a strong compressor makes of the same text: xz at its highest setting, of the first `XZ_BYTES` bytes as one stream."""
    text = text[:XZ_BYTES]
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def unigram_baseline(train: TokenStream, targets: Ids, token_bytes: Tensor, count_tokens: int = 1 << 26) -> HeldOut:
    """Targets [targets] predicted by token frequencies alone: add-one smoothed, of the first `count_tokens` training tokens."""
    counts = np.bincount(train.read(0, count_tokens), minlength=len(token_bytes)).astype(np.float64) + 1
    cost = -np.log(counts / counts.sum())
    nll, size = cost[targets], token_bytes.numpy()[targets]
    return HeldOut(float(nll.sum()), len(targets), float(nll[size > 0].sum()), float(size.sum()))
