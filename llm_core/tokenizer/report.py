"""tokenizers/<tokenizer_id>.report.json: what a tokenizer was trained on, and how well it compresses."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow as pa

from llm_core.corpus import source_of
from llm_core.layout import PreparedData
from llm_core.system import read_json
from llm_core.tokenizer.tokenizer import Ids, Tokenizer

_LISTED_SOURCES = 50


class Compression(TypedDict):
    """Compression of some text; more bytes per token and fewer tokens per word are better."""

    measured_bytes: int
    bytes_per_token: float
    tokens_per_word: float
    vocab_used: float  # share of the vocabulary that occurs in the text


class TokenizerReport(Compression):
    """The report that is stored with each tokenizer."""

    tokenizer_id: str
    tokenizer_type: str
    vocab_size: int
    sha256: str  # of the tokenizer.json
    config: dict[str, Any]  # the identity of its configuration
    snapshot_id: str  # of its training text
    train_bytes: int
    sources: list[dict[str, Any]]  # the compression of each of the largest sources


def read_report(data_dir: Path, tokenizer_id: str) -> TokenizerReport:
    """The report of a tokenizer.

    Raises:
        DataError: the file is missing or damaged.
    """
    return cast(TokenizerReport, read_json(PreparedData(data_dir).tokenizer_report(tokenizer_id)))


def measure_compression(
    tokenizer: Tokenizer, documents: pa.Table, texts: Iterator[str]
) -> tuple[Compression, list[dict[str, Any]]]:
    """The compression of some documents, in total and for each of the largest sources."""
    total, by_source = _Counts(tokenizer.vocab_size), defaultdict[str, _Counts](partial(_Counts, tokenizer.vocab_size))
    for path, text in zip(documents["path"].to_pylist(), texts, strict=True):
        ids = tokenizer.encode(text)
        total.add(text, ids)
        by_source[source_of(path)].add(text, ids)
    largest = sorted(by_source.items(), key=lambda item: (-item[1].bytes, item[0]))[:_LISTED_SOURCES]
    return total.compression(), [{"source": source, **counts.compression()} for source, counts in largest]


class _Counts:
    def __init__(self, vocab_size: int) -> None:
        self.used = np.zeros(vocab_size, dtype=bool)
        self.bytes = self.words = self.tokens = 0

    def add(self, text: str, ids: Ids) -> None:
        self.used[ids] = True
        self.bytes += len(text.encode())
        self.words += len(text.split())
        self.tokens += len(ids)

    def compression(self) -> Compression:
        return {
            "measured_bytes": self.bytes,
            "bytes_per_token": self.bytes / max(1, self.tokens),
            "tokens_per_word": self.tokens / max(1, self.words),
            "vocab_used": float(self.used.mean()),
        }
