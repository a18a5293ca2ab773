"""Files and documents: their records, formats and statuses, and how they are stored."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa

from llm_core.corpus import filters

KEPT = "kept"
# The status of a file that is read again at the next scan.
UNREADABLE = "unreadable"

# The advice on text in another encoding, which repairing would ruin.
CONVERT = "convert it to UTF-8, for instance with iconv"

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

# Statuses that depend on other documents.
RELATIVE = [DUPLICATE, NEAR_DUPLICATE]

# Every other status is a quarantine: something is wrong with the input. Text dropped by a filter is well-formed; it is counted
# and causes no warning.
HARMLESS = frozenset({KEPT, "blank", *RELATIVE}) | filters.REASONS

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
        ("document_id", pa.large_string()),  # sorting and searching limit plain strings to 2 GiB: 33 million ids
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

    `start` and `end` are byte offsets in the file's content (in .parquet files, row numbers) of the text or its .jsonl line.
    `text_start` is the byte offset of the document in the text of that line or row; 0 unless the text was split.
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


class FileRecord(NamedTuple):
    """One row of the files table.

    `bytes` and `sha256` describe the content: decompressed, and only the text column of a .parquet file. With invalid_utf8
    "replace" they describe the repaired text, unless the file is dropped as a whole. Of a dropped file that was not readable to
    its end, `bytes` is at least its size on disk.
    `replaced` counts the invalid UTF-8 sequences that became U+FFFD.
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
    """A file, or one text in it, is unusable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Rows:
    """Collects rows into Arrow batches, so that few are Python objects at any time."""

    def __init__(self, schema: pa.Schema, rows: Iterable[tuple[Any, ...]] = ()) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._pending = list(rows)

    def extend(self, rows: "Iterable[tuple[Any, ...]] | Rows") -> None:
        """Appends rows, or all rows of another collection with the same schema."""
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


Format = Literal["text", "jsonl", "parquet"]

_FORMATS: dict[str, Format] = {"txt": "text", "md": "text", "jsonl": "jsonl", "parquet": "parquet"}
_COMPRESSIONS = ("gz", "zst")


# For messages; each may also end in .gz or .zst.
READABLE = ".txt, .md, .jsonl or .parquet"


def format_of(path: str) -> Format | None:
    """Format of a file by its name, compressed or not; None if it is not readable."""
    stem, _, suffix = path.lower().rpartition(".")
    if suffix in _COMPRESSIONS:
        stem, _, suffix = stem.rpartition(".")
    return _FORMATS.get(suffix) if stem else None


def extension_of(path: str) -> str:
    """The end of a file's name in lower case, such as ".pdf" or ".csv.gz"; "no extension" without one."""
    name = path.rpartition("/")[2].lower()
    stem, _, suffix = name.rpartition(".")
    if stem and suffix in _COMPRESSIONS:
        inner = stem.rpartition(".")
        suffix = f"{inner[2]}.{suffix}" if inner[0] else suffix
    return f".{suffix}" if stem else "no extension"


def text_of(path: str, document_id: str) -> str:
    """The text that a document is a piece of: its file, or itself where a file holds a text in each line or row."""
    return path if format_of(path) == "text" else document_id


def source_of(path: str) -> str:
    """The source of a raw file: its top-level folder, or "." for a file in no folder."""
    folder, slash, _ = path.partition("/")
    return folder if slash else "."


class Stamp(NamedTuple):
    """Changes whenever the content of a file changes, so that a file with an equal stamp need not be opened."""

    size: int
    mtime_ns: int
    inode: int
    # Cannot be set by programs: reveals a file that was rewritten with its old mtime, as by unpacking an archive.
    ctime_ns: int = 0
    # The version that a remote file system reports.
    tag: str = ""

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


@dataclass
class FolderListing:
    """Readable files with their stamps, sorted by relative posix path, and counts of everything else.

    `ignored` counts files of other formats by `extension_of`, `skipped` what is never read by reason. `unreadable_folders` cannot
    be listed: their files are unknown.
    """

    files: dict[str, Stamp] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable_folders: list[str] = field(default_factory=list)


class OpenFile(NamedTuple):
    """A buffered, seekable file with its stamps; a remote stamp costs a request, so both are functions."""

    raw: IO[bytes]
    stamp_when_opened: Callable[[], Stamp]
    current_stamp: Callable[[], Stamp]
