"""What the modules of this package tell each other about files and documents, and how it is stored."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from llm_core.corpus import filters

KEPT = "kept"
UNREADABLE = "unreadable"
"""Of a file that is to be tried again at the next look."""

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

RELATIVE = [DUPLICATE, NEAR_DUPLICATE]
"""What a document is beside others; every other status is its own."""

HARMLESS = frozenset({KEPT, "blank", *RELATIVE}) | filters.REASONS
"""Every other status of a file or document is a quarantine: something is wrong with what was fed in.

What a filter drops is well-formed text that the user does not want: it is counted, but is no cause for a warning.
"""

FILES_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("documents", pa.int64()),
        ("byte_order_mark", pa.int64()),
        ("jsonl_envelope", pa.int64()),
        ("replaced", pa.int64()),
    ]
)
DOCUMENTS_SCHEMA = pa.schema(
    [
        ("document_id", pa.large_string()),  # of a plain string column, 2 GiB can be sorted or searched: 33 million ids
        ("path", pa.large_string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("text_start", pa.int64()),
        ("bytes", pa.int64()),
        ("characters", pa.int64()),
        ("split", pa.string()),
        ("status", pa.string()),
    ]
)

_ROWS_PER_BATCH = 1 << 16


class Document(NamedTuple):
    """One row of the documents table.

    `start` and `end` are bytes of the file's content: the text itself, or its .jsonl line; in a .parquet file they count rows.
    `text_start` is the byte of that line's or row's text where a part of a divided text begins, 0 everywhere else.
    """

    document_id: str
    path: str
    start: int
    end: int
    text_start: int
    bytes: int
    characters: int
    split: str
    status: str


class FileFacts(NamedTuple):
    """One row of the files table.

    `bytes` and `sha256` are those of the file's content: decompressed, of a .parquet file the values of its text column, and
    with invalid_utf8 "replace" repaired; `replaced` counts the sequences that were not UTF-8 and became U+FFFD.
    """

    path: str
    bytes: int
    sha256: str
    status: str
    detail: str
    documents: int
    byte_order_mark: int
    jsonl_envelope: int
    replaced: int


class Quarantine(Exception):
    """The file, or the one text at hand, is unusable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Rows:
    """Collects rows into Arrow batches, so that few of them are Python objects at any time."""

    def __init__(self, schema: pa.Schema, rows: Iterable[tuple[Any, ...]] = ()) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._pending = list(rows)

    def extend(self, rows: "Iterable[tuple[Any, ...]] | Rows") -> None:
        """Takes in rows, or those of another collection with the same schema."""
        if isinstance(rows, Rows):
            if rows._batches:
                self._flush()
                self._batches += rows._batches
            rows = rows._pending
        self._pending.extend(rows)
        if len(self._pending) >= _ROWS_PER_BATCH:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._batches, self._schema)

    def _flush(self) -> None:
        if self._pending:
            columns = zip(zip(*self._pending, strict=True), self._schema.types, strict=True)
            self._batches.append(pa.record_batch([pa.array(values, kind) for values, kind in columns], schema=self._schema))
            self._pending = []
