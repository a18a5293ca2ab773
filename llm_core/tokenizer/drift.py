"""How a tokenizer does on the current text: bytes per token on what is newer than it, round trips, and unknown text.

tokenizers/<tokenizer_id>.tried.json   the newest snapshot it was measured on, and the result: a cache

Only a sample of the documents added since the last measurement is read: when one file is added to ten thousand, only that file is
opened. When text is removed, other documents may replace it in the sample.
Without the cache, a rerun on 2,000 unchanged small files, half of them new, opens 678 in 0.4 s; with it, none in 0.03 s.
The share of unknown text is measured on all text, old and new, see `coverage`.
"""

from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus import InputDir, Snapshot, iter_texts, load_snapshot, source_of
from llm_core.errors import DataError
from llm_core.layout import PreparedData
from llm_core.system import read_json, write_json
from llm_core.tokenizer.coverage import Coverage, measure_coverage
from llm_core.tokenizer.report import TokenizerReport
from llm_core.tokenizer.tokenizer import Tokenizer

# A drift above this is reported, with the option that trains a new tokenizer.
MAX_DRIFT = 0.2

_SAMPLED_BYTES = 2 << 20
_SAMPLED_DOCUMENTS = 10_000
_ROUND_TRIPS = 100
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class DriftReport:
    """A tokenizer on the documents of a snapshot. New documents are those that its own training snapshot does not have."""

    # How much fewer bytes per token new documents have than the report, as a share; None if no document is new or the training
    # snapshot is gone.
    drift: float | None = None
    # Bytes per token of new documents by source.
    sources: list[dict[str, Any]] = field(default_factory=list)
    # Documents that were encoded and decoded, earlier measurements included.
    round_trips: int = 0
    # The first characters of documents that came back changed, by id.
    changed: dict[str, str] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)


@dataclass(frozen=True)
class _Cache(DriftReport):
    """The newest measurement, as it is on disk."""

    snapshot_id: str | None = None
    made_for: str | None = None  # the tokenizer's training snapshot
    tokens: dict[str, int] = field(default_factory=dict)  # of each sampled document

    @classmethod
    def read(cls, path: Path) -> "_Cache":
        """An empty cache if the file is missing, damaged or of another version."""
        try:
            content = read_json(path)
            # A cache without coverage is measured again; what it has is kept.
            coverage = {"coverage": Coverage(**content["coverage"])} if "coverage" in content else {"made_for": None}
            return cls(**content | coverage)
        except (DataError, TypeError):
            return cls()


def measure_drift(
    tokenizer: Tokenizer, report: TokenizerReport, snapshot: Snapshot, input_dir: InputDir, data_dir: Path
) -> DriftReport:
    """Measures a tokenizer on the documents added since the last measurement and merges the results.

    Raises:
        DataError: the text changed since the snapshot.
    """
    path = PreparedData(data_dir).drift_report(tokenizer.tokenizer_id)
    cache = _Cache.read(path)
    if (cache.snapshot_id, cache.made_for) != (snapshot.snapshot_id, report["snapshot_id"]):
        cache = _measure(cache, tokenizer, report, snapshot, input_dir, data_dir)
        write_json(path, asdict(cache))
    return cache


def _measure(
    cache: _Cache, tokenizer: Tokenizer, report: TokenizerReport, snapshot: Snapshot, input_dir: InputDir, data_dir: Path
) -> _Cache:
    documents = snapshot.kept_documents()
    added = _without(documents, _ids_of(cache.snapshot_id, data_dir)).slice(0, _ROUND_TRIPS)
    training_ids = _ids_of(report["snapshot_id"], data_dir)
    # Sampled by id, which is a hash: most documents of the last sample stay in it and are not read again.
    sampled = documents.slice(0, 0) if training_ids is None else _first(_without(documents, training_ids))
    uncounted = _without(sampled, pa.array(cache.tokens, pa.large_string()))
    to_read = documents.filter(_in(documents, pa.concat_arrays([_column(uncounted), _column(added)])))
    added_ids, tokens, changed = set(_column(added).to_pylist()), dict(cache.tokens), {}
    for document_id, text in zip(_column(to_read).to_pylist(), iter_texts(input_dir, to_read, snapshot.config), strict=True):
        ids = tokenizer.encode(text)
        tokens[document_id] = len(ids)
        if document_id in added_ids and not _comes_back(tokenizer, text, ids):
            changed[document_id] = text[:_SHOWN_CHARACTERS]

    tokens = {document_id: tokens[document_id] for document_id in _column(sampled).to_pylist()}
    changed_before = pa.array(cache.changed, pa.large_string())
    still_present = changed_before.filter(pc.is_in(changed_before, value_set=_column(documents))).to_pylist()
    return _Cache(
        drift=_drift(sampled, tokens, report),
        sources=_by_source(sampled, tokens),
        round_trips=cache.round_trips + len(added_ids),
        changed={document_id: cache.changed[document_id] for document_id in still_present} | changed,
        snapshot_id=snapshot.snapshot_id,
        made_for=report["snapshot_id"],
        tokens=tokens,
        coverage=measure_coverage(tokenizer, snapshot, input_dir),
    )


def _comes_back(tokenizer: Tokenizer, text: str, ids: Any) -> bool:
    """Whether decoding gives the text back; for WordPiece, which loses white space, whether it encodes what is printable."""
    if tokenizer.tokenizer_type == "wordpiece":
        return bool(len(ids)) or not any(character.isprintable() and not character.isspace() for character in text)
    return tokenizer.decode(ids) == text


def _ids_of(snapshot_id: str | None, data_dir: Path) -> pa.Array | None:
    """The ids of a snapshot's documents; None if the snapshot is gone."""
    if snapshot_id is None:
        return None
    try:
        return _column(load_snapshot(data_dir, snapshot_id).kept_documents())
    except DataError:
        return None


def _column(documents: pa.Table) -> pa.Array:
    return documents["document_id"].cast(pa.large_string()).combine_chunks()


def _in(documents: pa.Table, ids: pa.Array) -> pa.Array:
    return pc.is_in(_column(documents), value_set=ids)


def _without(documents: pa.Table, ids: pa.Array | None) -> pa.Table:
    return documents if ids is None else documents.filter(pc.invert(_in(documents, ids)))


def _first(documents: pa.Table) -> pa.Table:
    """A sample of documents: the first by id, at least one if there is any."""
    sampled = documents.sort_by("document_id").slice(0, _SAMPLED_DOCUMENTS)
    fitting = pc.sum(pc.less_equal(pc.cumulative_sum(sampled["bytes"]), _SAMPLED_BYTES)).as_py() or 0
    return sampled.slice(0, max(1, fitting))


def _drift(sampled: pa.Table, tokens: dict[str, int], report: TokenizerReport) -> float | None:
    counted = sum(tokens.values())
    if not counted:  # no new text, or none that the tokenizer encodes: WordPiece drops unprintable characters
        return None
    return float(1 - pc.sum(sampled["bytes"]).as_py() / counted / report["bytes_per_token"])


def _by_source(sampled: pa.Table, tokens: dict[str, int]) -> list[dict[str, Any]]:
    totals: dict[str, list[int]] = {}
    for document_id, path, size in zip(*(sampled[name].to_pylist() for name in ("document_id", "path", "bytes")), strict=True):
        total = totals.setdefault(source_of(path), [0, 0])
        total[0] += size
        total[1] += tokens[document_id]
    rows = [
        {"source": source, "measured_bytes": size, "bytes_per_token": size / max(1, counted)}
        for source, (size, counted) in totals.items()
    ]
    return sorted(rows, key=itemgetter("measured_bytes"), reverse=True)
