"""How much of the text a tokenizer cannot spell: WordPiece loses words with a rare character or of more than 100 characters.

The share of unknown text is the share of its UTF-8 bytes, white space aside, that no token stands for: words that become [UNK],
and control, format and private characters, which WordPiece drops. Byte-level types spell everything: their share is 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from llm_core.config import MIN_VOCAB_SIZE, TokenizerConfig
from llm_core.corpus import InputDir, Snapshot, iter_texts, source_of
from llm_core.errors import UserError
from llm_core.tokenizer.tokenizer import Tokenizer
from llm_core.tokenizer.training import Texts, options_for_bpe, train_with_all_characters

# Above the first share of unknown text data preparation warns; above the second it refuses.
WARN_UNKNOWN = 0.01
MAX_UNKNOWN = 0.2

# Text that is measured, divided equally among the sources.
_SAMPLED_BYTES = 2 << 20
# The largest sources are measured one by one, the others as one.
_LISTED_SOURCES = 50
_OTHER_SOURCES = "(others)"
# Text that remedies are tried on. What it is enough for, all of the text is enough for.
_TRIAL_BYTES = 32 << 20


@dataclass(frozen=True)
class Coverage:
    """The share of unknown text, in total and by source."""

    unknown: float = 0.0
    # {"source", "bytes" (of all its text), "unknown"}, the largest first; none for byte-level types.
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_low(self) -> bool:
        """Whether the text, or one of its sources, has more unknown text than `WARN_UNKNOWN`."""
        return max([self.unknown, *(source["unknown"] for source in self.sources)]) > WARN_UNKNOWN

    def __str__(self) -> str:
        worst = sorted(self.sources, key=lambda source: -source["bytes"] * source["unknown"])[:3]
        by_source = ", ".join(f"{source['source']} {source['unknown']:.1%}" for source in worst)
        return f"{self.unknown:.1%} of the text" + (f" ({by_source})" if by_source else "")


def measure_coverage(tokenizer: Tokenizer, snapshot: Snapshot, input_dir: InputDir) -> Coverage:
    """Measures a tokenizer on a sample of each source of a snapshot, at least one document. Reads nothing for byte-level types.

    Raises:
        DataError: the text changed since the snapshot.
    """
    if tokenizer.tokenizer_type != "wordpiece":
        return Coverage()
    documents = snapshot.kept_documents()
    names, numbers = _sources(documents)
    sizes = np.bincount(numbers, documents["bytes"].to_numpy(), len(names))
    rows = _sample(documents, numbers)
    spelled, visible = np.zeros(len(names)), np.zeros(len(names))
    for number, text in zip(numbers[rows], iter_texts(input_dir, documents.take(rows), snapshot.config), strict=True):
        spelled[number] += tokenizer.spelled_bytes(text)
        visible[number] += len("".join(text.split()).encode())
    unknown = np.maximum(0, 1 - spelled / np.maximum(1, visible))  # Python takes some control characters for white space
    sources = [
        {"source": names[number], "bytes": int(sizes[number]), "unknown": float(unknown[number])}
        for number in np.argsort(-sizes, kind="stable")
    ]
    return Coverage(float(unknown @ sizes / max(1, sizes.sum())), sources)


def require_coverage(coverage: Coverage, config: TokenizerConfig, texts: Texts, snapshot: Snapshot, input_dir: InputDir) -> None:
    """Refuses a tokenizer that loses too much text. texts: its training text.

    Raises:
        UserError: more than `MAX_UNKNOWN` of the text is unknown; the message has options that were tried.
    """
    if coverage.unknown <= MAX_UNKNOWN:
        return

    def trial_texts() -> Iterator[str]:
        size = 0
        for text in texts():
            yield text
            size += len(text.encode())
            if size > _TRIAL_BYTES:
                return

    remedies = [options_for_bpe(trial_texts, config)]
    larger = train_with_all_characters(trial_texts, config)
    if larger.vocab_size >= MIN_VOCAB_SIZE and not measure_coverage(larger, snapshot, input_dir).is_low:
        same = larger.vocab_size == config.vocab_size
        remedies.append("--retrain_tokenizer" if same else f"--vocab_size {larger.vocab_size}")
    advice = " or ".join(filter(None, remedies))
    raise UserError(
        f"--tokenizer_type {config.tokenizer_type}: with --vocab_size {config.vocab_size} it cannot spell {coverage}, which would"
        f" be lost; {f'use {advice}' if advice else 'add text to --input_dir'}"
    )


def _sources(documents: pa.Table) -> tuple[list[str], np.ndarray]:
    """Names of the largest sources, and of the others together; and the number of the source of each document."""
    paths = documents["path"].combine_chunks().dictionary_encode()
    names, of_path = np.unique([source_of(path) for path in paths.dictionary.to_pylist()], return_inverse=True)
    numbers = of_path[paths.indices.to_numpy()]
    sizes = np.bincount(numbers, documents["bytes"].to_numpy())
    listed = np.argsort(-sizes, kind="stable")[:_LISTED_SOURCES]
    place = np.full(len(names), len(listed))
    place[listed] = np.arange(len(listed))
    others = [_OTHER_SOURCES] if len(names) > len(listed) else []
    return [*names[listed].tolist(), *others], place[numbers]


def _sample(documents: pa.Table, numbers: np.ndarray) -> np.ndarray:
    """Rows of a sample of each source, in order. Chosen by id, which is a hash."""
    order = documents.select(["document_id", "bytes"]).append_column("source", pa.array(numbers))
    order = order.append_column("row", pa.array(np.arange(len(numbers)))).sort_by(
        [("source", "ascending"), ("document_id", "ascending")]
    )
    sizes, sources = order["bytes"].to_numpy(), order["source"].to_numpy()
    before = np.cumsum(sizes) - sizes
    first = np.searchsorted(sources, sources)  # the first row of the same source
    chosen = before - before[first] < _SAMPLED_BYTES / (1 + numbers.max())
    return np.sort(order["row"].to_numpy()[chosen])
