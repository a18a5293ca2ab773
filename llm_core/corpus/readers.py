"""A file to its documents, and documents back to their text.

Every byte read ends in exactly one place: in the text of a kept document, or dropped under a reason. Whatever a file holds, it
can only be quarantined; the rest of the corpus goes on.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import IO

import pyarrow as pa

from llm_core.config import CorpusConfig
from llm_core.corpus.content import Content, Meter, open_content, repaired
from llm_core.corpus.folder import format_of
from llm_core.corpus.parquet_format import ParquetTexts, parquet_documents
from llm_core.corpus.records import DOCUMENTS_SCHEMA, HARMLESS, KEPT, UNREADABLE, Document, FileFacts, Quarantine, Rows
from llm_core.corpus.source import InputDir, Source, open_source
from llm_core.corpus.text_formats import jsonl_documents, jsonl_text, text_documents
from llm_core.errors import DataError
from llm_core.tables import iter_rows

_ATTEMPTS = 3

_AT_ONCE = 1 << 13
"""Documents that are Python objects at any time."""

BYTES_PER_TEXT = 16
"""A file with more lines or rows than one for each of so many bytes that come out of it, or than one for each byte of its own,
was made to exhaust memory: a row takes about 190. Lines of logs and short comments have 40 and more, compressed still 3."""

MAX_TEXTS_FREE = 1 << 18
"""Up to this many lines or rows the size of the file does not matter."""

MAX_UNUSABLE = 1 << 18
"""A file that begins with more unusable lines or rows than this, and than usable ones, is set aside as a whole."""


def read_file(source: Source, path: str, config: CorpusConfig) -> tuple[FileFacts, Rows]:
    """Reads one file into rows of the documents table; of one that cannot be read, the status says so.

    Raises:
        DataError: the file kept changing while it was read, or the place it is in cannot be reached.
    """
    for _ in range(_ATTEMPTS):
        try:
            with source.open(path) as file:
                before = file.opened()
                facts, documents = _read_open_file(file.raw, before.size, path, config)
                if file.look() == before:
                    return facts, documents
        except OSError as error:
            detail = error.strerror or str(error)
            return FileFacts(path, 0, hashlib.sha256().hexdigest(), UNREADABLE, detail, 0, 0, 0, 0), Rows(DOCUMENTS_SCHEMA)
    raise DataError(f"{source.address(path)}: changed {_ATTEMPTS} times while it was read; run again when it is at rest")


def _read_open_file(raw: IO[bytes], size: int, path: str, config: CorpusConfig) -> tuple[FileFacts, Rows]:
    meter = Meter(size)
    byte_order_mark = jsonl_envelope = 0
    detail = ""
    format = format_of(path)
    content = Content(raw, path, meter, config.invalid_utf8 == "replace") if format != "parquet" else None
    try:
        byte_order_mark = content.skip_byte_order_mark() if content else 0
        if content is None:
            found = _Found.collect(parquet_documents(raw, path, config, meter), size, meter)
        elif format == "text":
            # Its pieces are as long as was asked for: their number says nothing of the file.
            found = _Found.collect(iter(text_documents(content, path, config)), size)
        else:
            found = _Found.collect(jsonl_documents(content, path, config), size, meter)
            # A rejected line counts whole, under its own reason; of every other line all but the text is envelope.
            jsonl_envelope = meter.position - byte_order_mark - found.bytes
        status = KEPT if found.kept else found.first.status if found.first else "empty"
    except Quarantine as quarantine:
        status, detail = quarantine.reason, quarantine.detail
        found, byte_order_mark = _Found(), 0
        if content:
            content.drain()
    replaced = meter.replaced if found.count else 0
    counts = (found.count, byte_order_mark, jsonl_envelope, replaced)
    # A text that is one document has its hash already.
    whole = format == "text" and found.count == 1 and found.bytes == meter.position
    sha256 = found.first.document_id if whole and found.first else meter.sha256()
    return FileFacts(path, meter.position, sha256, status, detail, *counts), found.rows


class _Found:
    """The documents of one file, as they come. A few bytes can stand for millions of them."""

    def __init__(self) -> None:
        self.rows = Rows(DOCUMENTS_SCHEMA)
        self.first: Document | None = None
        self.count = self.bytes = self.unusable = 0
        self.kept = False

    @classmethod
    def collect(cls, documents: Iterator[Document], size: int, meter: Meter | None = None) -> "_Found":
        """The documents of a file of `size` bytes; meter: of what comes out of it, where their number is to be in proportion.

        Raises:
            Quarantine: they are more than such a file has a use for.
        """
        found = cls()
        while some := list(itertools.islice(documents, _AT_ONCE)):
            found._add(some)
            if meter is None:
                continue
            if found.unusable > MAX_UNUSABLE and 2 * found.unusable > found.count:
                raise Quarantine(
                    "mostly_unusable", f"{found.unusable} of the first {found.count} lines or rows, the last: {some[-1].status}"
                )
            if found.count > max(MAX_TEXTS_FREE, min(meter.position // BYTES_PER_TEXT, size)):
                come_out = f", {meter.position} as they are read" if meter.position != size else ""
                raise Quarantine("too_many_texts", f"{found.count} lines or rows and more in {size} bytes{come_out}")
        return found

    def _add(self, documents: list[Document]) -> None:
        self.rows.extend(documents)
        self.first = self.first or documents[0]
        self.count += len(documents)
        self.bytes += sum(document.bytes for document in documents)
        statuses = Counter(document.status for document in documents)
        self.unusable += sum(count for status, count in statuses.items() if status == "blank" or status not in HARMLESS)
        self.kept = self.kept or KEPT in statuses


def iter_texts(input_dir: InputDir, rows: pa.Table, config: CorpusConfig) -> Iterator[str]:
    """Texts of the given rows of the documents table, in their order; each run of rows of one file opens it once.

    Raises:
        DataError: a file is gone or cannot be reached, or what it holds is no longer the text whose hash is the document's id.
    """
    source = open_source(input_dir)
    columns = ("document_id", "path", "start", "end", "text_start", "bytes")
    for path, group in itertools.groupby(iter_rows(rows, *columns), key=itemgetter(1)):
        try:
            with source.open(path) as file, _texts_of(file.raw, path, config) as text_at:
                text_at_start, text = -1, b""
                for document_id, _, start, end, text_start, size in group:
                    if start != text_at_start:
                        text, text_at_start = text_at(start, end), start
                    piece = text[text_start : text_start + size]
                    if hashlib.sha256(piece).hexdigest() != document_id:
                        raise _changed(source, path)
                    yield piece.decode()
        except (OSError, Quarantine, UnicodeDecodeError):
            raise _changed(source, path) from None


def _changed(source: Source, path: str) -> DataError:
    return DataError(
        f"{source.address(path)}: changed since the snapshot was taken; run again (and if it says so again: touch the file)"
    )


@contextmanager
def _texts_of(raw: IO[bytes], path: str, config: CorpusConfig) -> Iterator[Callable[[int, int], bytes]]:
    """A function from `start` and `end` of a document to the whole text it is a part of."""
    if format_of(path) == "parquet":
        with ParquetTexts.open(raw, path, config, Meter(0)) as texts:
            yield lambda start, end: texts.text(start)
        return
    content = open_content(raw, path)
    if config.invalid_utf8 == "replace":
        content = repaired(content, Meter(0))

    def read(start: int, end: int) -> bytes:
        content.seek(start)
        data: bytes = content.read(end - start)
        return jsonl_text(data, config.text_field) if format_of(path) == "jsonl" else data

    yield read
