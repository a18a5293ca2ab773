"""Held-out figures against values worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm_core.dataset import TokenStream, Windows
from llm_core.distributed import Ranks
from llm_core.evaluate import evaluate, token_bytes, unigram_baseline
from llm_core.shards import load_manifest
from llm_core.tokenizer import Tokenizer
from tests.llm_core.test_model import build

EOT = 0
ALONE = Ranks.alone("cpu", 1)


def stream_of(length: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(1, 300, length).astype(np.uint16)
    tokens[::10] = EOT
    return tokens


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rule_23_bits_per_byte_counts_text_alone(batch_size: int) -> None:
    tokens = stream_of(100)
    sizes = torch.arange(300).double() % 5 + 1
    sizes[EOT] = 0
    model = build(length=16).eval()
    found = evaluate(model, Windows([TokenStream([tokens])], 16, 0, EOT), sizes, max_tokens=0, batch_size=batch_size, ranks=ALONE)
    nll = 0.0
    text = []
    for start in range(0, 99, 16):  # window by window, each with no context but its own
        piece = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        with torch.no_grad():
            losses = F.cross_entropy(model.logits(piece[None, :-1])[0], piece[1:], reduction="none")
        nll += losses.sum().item()
        text += [(loss, sizes[token]) for loss, token in zip(losses.tolist(), piece[1:].tolist(), strict=True) if token != EOT]
    assert found.targets == 99
    assert found.loss == pytest.approx(nll / 99, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / 99), rel=1e-4)
    bits = sum(loss for loss, _ in text) / math.log(2) / sum(size for _, size in text)
    assert found.bits_per_byte == pytest.approx(float(bits), rel=1e-5)


def test_the_text_of_a_split_is_all_of_its_bytes(processed_dir: Path) -> None:
    """Byte lengths of tokens add up to the bytes of the documents: nothing is counted twice or lost."""
    manifest = load_manifest(processed_dir)
    tokenizer = Tokenizer.load(processed_dir / manifest.tokenizer.file)
    windows = Windows.open(processed_dir, manifest, "val", 32, 0)
    found = evaluate(build(vocab_size=512), windows, token_bytes(tokenizer, manifest), max_tokens=0, batch_size=64, ranks=ALONE)
    assert found.text_bytes == manifest.splits["val"].bytes
    assert found.targets == manifest.splits["val"].tokens - 1


def test_a_budget_reads_the_first_windows() -> None:
    windows = Windows([TokenStream([stream_of(100)])], 16, 0, EOT)
    model, sizes = build(length=16), torch.ones(300).double()
    assert evaluate(model, windows, sizes, max_tokens=20, batch_size=4, ranks=ALONE).targets == 32


def test_the_unigram_baseline_is_the_entropy_of_token_frequencies() -> None:
    tokens = stream_of(1000)
    windows = Windows([TokenStream([tokens])], 16, 0, EOT)
    sizes = torch.ones(300).double()
    sizes[EOT] = 0
    found = unigram_baseline(windows.streams[0], windows, sizes, 0)
    counts = np.bincount(tokens, minlength=300) + 1
    cost = -np.log(counts / counts.sum())[tokens[1:]]
    assert found.loss == pytest.approx(cost.mean())
    text = tokens[1:] != EOT
    assert found.bits_per_byte == pytest.approx(cost[text].sum() / math.log(2) / text.sum())
