"""Small corpora of every format, and checks of their snapshots."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_core.config import CorpusConfig
from llm_core.corpus import Snapshot, iter_texts

# Half of the documents are in each split, so that a few files are enough for both.
HALF = CorpusConfig(val_fraction=0.49, max_document_bytes=256)


def fill(directory: Path, count: int = 16) -> None:
    """Writes small files, enough for both splits."""
    directory.mkdir(exist_ok=True)
    for number in range(count):
        (directory / f"plain{number:02}.txt").write_text(f"This is text number {number}.\n" * 3)


def statuses(snapshot: Snapshot) -> dict[str, str]:
    return dict(zip(snapshot.files["path"].to_pylist(), snapshot.files["status"].to_pylist(), strict=True))


def texts_of(snapshot: Snapshot, raw: Path) -> list[str]:
    return list(iter_texts(raw, snapshot.kept_documents(), snapshot.config))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def write_parquet(path: Path, values: list[Any], kind: pa.DataType | None = None, **options: Any) -> None:
    """A file with an `id` column beside the `text` column."""
    table = pa.table({"id": pa.array(range(len(values))), "text": pa.array(values, kind or pa.string())})
    pq.write_table(table, path, **options)


def write_jsonl(path: Path, *values: Any) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def assert_bytes_add_up(snapshot: Snapshot) -> None:
    summary = snapshot.summary
    assert summary["bytes_read"] == summary["bytes_kept"] + sum(summary["bytes_dropped"].values())
    assert summary["bytes_kept"] == summary["train_bytes"] + summary["val_bytes"]
