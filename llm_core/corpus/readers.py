"""Bytes of a file to documents, and documents back to their text.

Every byte read ends in exactly one place: in the text of a kept document, or dropped under a reason. Whatever a file holds, it
can only be quarantined; the rest of the corpus goes on.
"""

import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from llm_core.config import CorpusConfig
from llm_core.corpus.folder import Stamp, format_of
from llm_core.errors import DataError

KEPT = "kept"

MAX_LINE_BYTES = 64 << 20
"""A .jsonl line is held in memory; a file with a longer one is quarantined."""

MAX_COMPRESSION = 200
"""Decompressed bytes per compressed byte; text stays below 30, a file above this is taken for a decompression bomb."""

MAX_COMPRESSION_FREE = 64 << 20
"""Up to this many decompressed bytes the ratio does not matter."""

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20
_ATTEMPTS = 3


class Document(NamedTuple):
    """One row of the documents table.

    `start` and `end` are bytes of the (decompressed) file: the text itself, or its .jsonl line; `text_start` is the byte of
    that line's text where a part of a divided text begins, 0 everywhere else.
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
    """One row of the files table; `bytes` and `sha256` are those of the (decompressed) content."""

    path: str
    bytes: int
    sha256: str
    status: str
    detail: str
    documents: int
    byte_order_mark: int
    jsonl_envelope: int


class _Quarantine(Exception):
    """The whole file is unusable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def split_of(document_id: str, val_fraction: float) -> str:
    """Side of a document: its hash, read as a number in [0, 1), against the fraction. Nothing else can move it."""
    return "val" if int(document_id[:16], 16) / 2**64 < val_fraction else "train"


def piece_end(data: bytes, start: int, max_bytes: int) -> int:
    """Where the piece that begins at `start` ends: after its last line that fits, else between two characters."""
    end = start + max_bytes
    if end >= len(data):
        return len(data)
    line_end = data.rfind(b"\n", start, end) + 1
    if line_end > start:
        return line_end
    while end > start + max_bytes - 4 and data[end] & 0xC0 == 0x80:  # inside a UTF-8 character of at most 4 bytes
        end -= 1
    return end


class _Source:
    """Reads a file's (decompressed) bytes once, in order, counting and hashing them."""

    def __init__(self, raw: IO[bytes], path: str, size: int) -> None:
        self._content: Any = _decompressed(raw, path)
        self._max_bytes = max(MAX_COMPRESSION_FREE, size * MAX_COMPRESSION)
        self._hash = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        return self._take(self._content.read, size)

    def readline(self, limit: int) -> bytes:
        return self._take(self._content.readline, limit)

    def skip_byte_order_mark(self) -> int:
        mark = self._guard(self._content.peek, len(_BOM))[: len(_BOM)]
        return len(self.read(len(_BOM))) if mark == _BOM else 0

    def drain(self) -> None:
        """Counts and hashes what is left, as far as it can be read."""
        with suppress(_Quarantine):
            while self.read(_BLOCK):
                pass

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _take(self, read: Callable[[int], bytes], size: int) -> bytes:
        data = self._guard(read, size)
        self._hash.update(data)
        self.position += len(data)
        if self.position > self._max_bytes:
            raise _Quarantine("too_compressed", f"more than {self._max_bytes} bytes come out of it")
        return data

    def _guard(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _Quarantine("unreadable_gzip", str(error)) from None


def read_file(input_dir: Path, path: str, config: CorpusConfig) -> tuple[FileFacts, list[Document], Stamp | None]:
    """Reads one file into documents; the stamp is that of the bytes read, None if the file could not be read.

    Raises:
        DataError: the file kept changing while it was read.
    """
    for _ in range(_ATTEMPTS):
        try:
            with _open_regular(input_dir / path) as raw:
                before = Stamp.of(os.fstat(raw.fileno()))
                facts, documents = _read_open_file(raw, before.size, path, config)
                if Stamp.of(os.fstat(raw.fileno())) == before:
                    return facts, documents, before
        except OSError as error:
            detail = error.strerror or str(error)
            return FileFacts(path, 0, hashlib.sha256().hexdigest(), "unreadable", detail, 0, 0, 0), [], None
    raise DataError(f"{input_dir / path}: changed {_ATTEMPTS} times while it was read; run again when it is at rest")


def _read_open_file(raw: IO[bytes], size: int, path: str, config: CorpusConfig) -> tuple[FileFacts, list[Document]]:
    source = _Source(raw, path, size)
    byte_order_mark = jsonl_envelope = 0
    detail = ""
    try:
        byte_order_mark = source.skip_byte_order_mark()
        if format_of(path) == "text":
            documents = list(_text_documents(source, path, config))
        else:
            documents = list(_jsonl_documents(source, path, config))
            # A rejected line counts whole, under its own reason; of every other line all but the text is envelope.
            jsonl_envelope = source.position - byte_order_mark - sum(document.bytes for document in documents)
        kept = any(document.status == KEPT for document in documents)
        status = KEPT if kept else documents[0].status if documents else "empty"
    except _Quarantine as quarantine:
        status, detail = quarantine.reason, quarantine.detail
        documents, byte_order_mark = [], 0
        source.drain()
    facts = FileFacts(path, source.position, source.sha256(), status, detail, len(documents), byte_order_mark, jsonl_envelope)
    return facts, documents


def _text_documents(source: _Source, path: str, config: CorpusConfig) -> Iterator[Document]:
    start, pending, block = source.position, b"", b"more"
    while block:
        block = source.read(_BLOCK)
        pending += block
        used = 0
        while len(pending) - used > config.max_document_bytes or (not block and used < len(pending)):
            end = piece_end(pending, used, config.max_document_bytes)
            yield _document(pending[used:end], path, start + used, start + end, 0, config.val_fraction)
            used = end
        start, pending = start + used, pending[used:]


def _jsonl_documents(source: _Source, path: str, config: CorpusConfig) -> Iterator[Document]:
    while line := source.readline(MAX_LINE_BYTES + 1):
        start, end = source.position - len(line), source.position
        if len(line) > MAX_LINE_BYTES:
            raise _Quarantine("line_too_long", f"the line at byte {start} has more than {MAX_LINE_BYTES} bytes")
        if not line.strip():
            continue
        try:
            text = _jsonl_text(line, config.text_field)
        except UnicodeDecodeError as error:
            raise _not_utf8(start, error) from None
        except _Quarantine as quarantine:  # this line alone
            yield _rejected(line, path, start, end, config.val_fraction, quarantine.reason)
            continue
        text_start = 0
        while True:
            text_end = piece_end(text, text_start, config.max_document_bytes)
            yield _document(text[text_start:text_end], path, start, end, text_start, config.val_fraction)
            text_start = text_end
            if text_end == len(text):
                break


def _jsonl_text(line: bytes, text_field: str) -> bytes:
    """UTF-8 bytes of the text in one line. Never longer than the line: no JSON escape is shorter than what it stands for."""
    decoded = line.decode()
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise _Quarantine("unreadable_json", str(error)) from None
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise _Quarantine("no_text_field", f"no string under {text_field!r}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _Quarantine("lone_surrogate", "an escape stands for half a character") from None


def _document(data: bytes, path: str, start: int, end: int, text_start: int, val_fraction: float) -> Document:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(start, error) from None
    document_id = hashlib.sha256(data).hexdigest()
    status = "blank" if not text or text.isspace() else KEPT
    split = split_of(document_id, val_fraction)
    return Document(document_id, path, start, end, text_start, len(data), len(text), split, status)


def _rejected(line: bytes, path: str, start: int, end: int, val_fraction: float, reason: str) -> Document:
    """A line without usable text stands in the table under the hash of its raw bytes."""
    document_id = hashlib.sha256(line).hexdigest()
    return Document(document_id, path, start, end, 0, len(line), 0, split_of(document_id, val_fraction), reason)


def _not_utf8(start: int, error: UnicodeDecodeError) -> _Quarantine:
    return _Quarantine("not_utf8", f"{error.reason} at byte {start + error.start}")


def _decompressed(raw: IO[bytes], path: str) -> Any:
    return gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw


@contextmanager
def _open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Opens a regular file; O_NONBLOCK, so that a FIFO put in its place cannot hold us."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as raw:
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        yield raw


def iter_texts(input_dir: Path, rows: pa.Table, text_field: str) -> Iterator[str]:
    """Texts of the given rows of the documents table, in their order; each run of rows of one file opens it once.

    Raises:
        DataError: a file is gone, or what it holds is no longer the text whose hash is the document's id.
    """
    for path, group in groupby(_iter_rows(rows), key=lambda row: row[1]):
        changed = DataError(f"{input_dir / path}: changed since the snapshot was taken; run again")
        try:
            with _open_regular(input_dir / path) as raw:
                content = _decompressed(raw, path)
                line_start, text = -1, b""
                for document_id, _, start, end, text_start, size in group:
                    if start != line_start:
                        content.seek(start)
                        data = content.read(end - start)
                        text = _jsonl_text(data, text_field) if format_of(path) == "jsonl" else data
                        line_start = start
                    piece = text[text_start : text_start + size]
                    if hashlib.sha256(piece).hexdigest() != document_id:
                        raise changed
                    yield piece.decode()
        except (OSError, EOFError, zlib.error, _Quarantine, UnicodeDecodeError):
            raise changed from None


def _iter_rows(rows: pa.Table) -> Iterator[tuple[str, str, int, int, int, int]]:
    for batch in rows.select(["document_id", "path", "start", "end", "text_start", "bytes"]).to_batches(max_chunksize=4096):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
