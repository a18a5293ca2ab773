"""Files to documents, and documents back to their text.

Every byte read is in a kept document or dropped for a reason. Whatever a file contains, at worst it is quarantined: the rest of
the corpus is read.
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
from llm_core.corpus.documents import binary
from llm_core.corpus.input_folder import InputDir, InputFolder, open_input_folder
from llm_core.corpus.parquet_format import ParquetTexts, parquet_documents
from llm_core.corpus.streams import Content, Meter, open_content, repaired
from llm_core.corpus.text_formats import jsonl_documents, jsonl_text, text_documents
from llm_core.corpus.types import (
    CONVERT,
    DOCUMENTS_SCHEMA,
    HARMLESS,
    KEPT,
    UNREADABLE,
    Document,
    FileRecord,
    Quarantine,
    Rows,
    format_of,
)
from llm_core.errors import DataError
from llm_core.system import iter_rows

_ATTEMPTS = 3

# Documents that are Python objects at any time.
_BATCH_SIZE = 1 << 13

# Minimum bytes of content per line or row. A line or row must also take at least one byte of the file itself. A file below either
# limit was made to exhaust memory: a row takes about 190 bytes. Logs and short comments have 40 bytes per line, 3 compressed.
BYTES_PER_TEXT = 16

# The limit above is not checked up to this many lines or rows.
MAX_TEXTS_FREE = 1 << 18

# A file that begins with more unusable lines or rows than this, and than usable ones, is quarantined as a whole.
MAX_UNUSABLE = 1 << 18

# A file that is not UTF-8 and has more bad sequences than one in this many bytes is probably text in another encoding.
_BYTES_PER_BAD_SEQUENCE = 100


def read_file(folder: InputFolder, path: str, size: int, config: CorpusConfig) -> tuple[FileRecord, Rows]:
    """Reads one file: its record, and rows of the documents table. The status of an unreadable file is UNREADABLE.

    size: bytes of the file when the folder was listed, which is all that is known of an unreadable one.

    Raises:
        DataError: the file kept changing while it was read, or the folder cannot be reached.
    """
    for _ in range(_ATTEMPTS):
        try:
            with folder.open(path) as file:
                before = file.stamp_when_opened()
                record, documents = _read_open_file(file.raw, before.size, path, config)
                if record.status == "not_utf8" and not record.documents and CONVERT not in record.detail:
                    record = record._replace(detail=f"{record.detail}; {_after_repair(file.raw, before.size, record, config)}")
                if file.current_stamp() == before:
                    return record, documents
        except OSError as error:
            meter, detail = Meter(size), error.strerror or str(error)
            meter.count_at_least(size)
            record = FileRecord(path, meter.position, meter.sha256(), UNREADABLE, detail, 0, 0, 0, 0)
            return record, Rows(DOCUMENTS_SCHEMA)
    raise DataError(f"{folder.address(path)}: changed {_ATTEMPTS} times while it was read; run again when it no longer changes")


def _read_open_file(raw: IO[bytes], size: int, path: str, config: CorpusConfig) -> tuple[FileRecord, Rows]:
    meter = Meter(size)
    byte_order_mark = jsonl_envelope = 0
    detail = ""
    format, repair = format_of(path), config.invalid_utf8 == "replace"
    content = Content(raw, path, meter, repair) if format != "parquet" else None
    try:
        byte_order_mark = content.skip_byte_order_mark() if content else 0
        if content is None:
            documents = _FileDocuments.collect(parquet_documents(raw, path, config, meter), size, meter)
        elif format == "text":
            # The number of pieces follows from max_document_bytes: not a sign of a hostile file.
            documents = _FileDocuments.collect(iter(text_documents(content, path, config)), size)
        else:
            documents = _FileDocuments.collect(jsonl_documents(content, path, config), size, meter)
            # A rejected line is dropped entirely; of any other line everything but the text is envelope.
            jsonl_envelope = meter.position - byte_order_mark - documents.bytes
        if meter.damage:
            if not documents.count:
                raise meter.damage
            detail = meter.damage.detail
        status = KEPT if documents.kept else documents.first.status if documents.first else "empty"
    except Quarantine as quarantine:
        status, detail = quarantine.reason, quarantine.detail
        documents, byte_order_mark = _FileDocuments(), 0
        if content and repair:  # what is dropped is the file as it is
            raw.seek(0)
            meter = Meter(size)
            first_nul = Content(raw, path, meter).drain()
            if status == "binary" and first_nul >= 0:
                detail = binary(first_nul).detail
        elif content:
            content.drain()
        if content is None or meter.failure or meter.damage:
            meter.count_at_least(size)
    replaced = meter.replaced if documents.count else 0
    counts = (documents.count, byte_order_mark, jsonl_envelope, replaced)
    # The id of a text's only document is the hash of the text.
    one_document = format == "text" and documents.count == 1 and documents.bytes == meter.position
    sha256 = documents.first.document_id if one_document and documents.first else meter.sha256()
    return FileRecord(path, meter.position, sha256, status, detail, *counts), documents.rows


def _after_repair(raw: IO[bytes], size: int, dropped: FileRecord, config: CorpusConfig) -> str:
    """What repairing a file that is dropped because it is not UTF-8 would keep and cost."""
    raw.seek(0)
    record, _ = _read_open_file(raw, size, dropped.path, config.model_copy(update={"invalid_utf8": "replace"}))
    if record.status != KEPT:
        return f"--invalid_utf8 replace would not keep it ({record.status})"
    if record.replaced * _BYTES_PER_BAD_SEQUENCE > dropped.bytes:
        return f"{record.replaced:,} bad sequences in {dropped.bytes:,} bytes, probably another encoding; {CONVERT}"
    return f"--invalid_utf8 replace would keep its {dropped.bytes:,} bytes, with {record.replaced:,} bad sequences replaced"


class _FileDocuments:
    """The documents of one file, counted as they are read: a few bytes can expand to millions of them."""

    def __init__(self) -> None:
        self.rows = Rows(DOCUMENTS_SCHEMA)
        self.first: Document | None = None
        self.count = self.bytes = self.unusable = 0
        self.kept = False

    @classmethod
    def collect(cls, documents: Iterator[Document], size: int, meter: Meter | None = None) -> "_FileDocuments":
        """The documents of a file of `size` bytes. meter: of its content, where the number of documents is limited.

        Raises:
            Quarantine: the number of documents is out of proportion to the file.
        """
        collected = cls()
        while batch := list(itertools.islice(documents, _BATCH_SIZE)):
            collected._add(batch)
            if meter is None:
                continue
            if collected.unusable > MAX_UNUSABLE and 2 * collected.unusable > collected.count:
                raise Quarantine(
                    "mostly_unusable",
                    f"{collected.unusable} of the first {collected.count} lines or rows, the last: {batch[-1].status}",
                )
            if collected.count > max(MAX_TEXTS_FREE, min(meter.position // BYTES_PER_TEXT, size)):
                expansion = f", {meter.position} as they are read" if meter.position != size else ""
                raise Quarantine("too_many_texts", f"{collected.count} lines or rows and more in {size} bytes{expansion}")
        return collected

    def _add(self, documents: list[Document]) -> None:
        self.rows.extend(documents)
        self.first = self.first or documents[0]
        self.count += len(documents)
        self.bytes += sum(document.bytes for document in documents)
        statuses = Counter(document.status for document in documents)
        self.unusable += sum(count for status, count in statuses.items() if status == "blank" or status not in HARMLESS)
        self.kept = self.kept or KEPT in statuses


def iter_texts(input_dir: InputDir, rows: pa.Table, config: CorpusConfig) -> Iterator[str]:
    """Texts of rows of the documents table, in order; adjacent rows of one file open it once.

    Raises:
        DataError: a file is missing or unreachable, or a text no longer has the hash that is its document's id.
    """
    folder = open_input_folder(input_dir)
    columns = ("document_id", "path", "start", "end", "text_start", "bytes")
    for path, group in itertools.groupby(iter_rows(rows, *columns), key=itemgetter(1)):
        try:
            with folder.open(path) as file, _texts_of(file.raw, path, config) as text_at:
                text_at_start, text = -1, b""
                for document_id, _, start, end, text_start, size in group:
                    if start != text_at_start:
                        text, text_at_start = text_at(start, end), start
                    piece = text[text_start : text_start + size]
                    if hashlib.sha256(piece).hexdigest() != document_id:
                        raise _changed(folder, path)
                    yield piece.decode()
        except (OSError, Quarantine, UnicodeDecodeError):
            raise _changed(folder, path) from None


def _changed(folder: InputFolder, path: str) -> DataError:
    return DataError(
        f"{folder.address(path)}: changed since the snapshot was taken; run again (if the message comes back, touch the file)"
    )


@contextmanager
def _texts_of(raw: IO[bytes], path: str, config: CorpusConfig) -> Iterator[Callable[[int, int], bytes]]:
    """Yields a function from `start` and `end` of a document to the complete text that contains it."""
    if format_of(path) == "parquet":
        with ParquetTexts.open(raw, path, config, Meter(0)) as texts:
            yield lambda start, end: texts.text(start)
        return
    content = open_content(raw, path, Meter(0))
    if config.invalid_utf8 == "replace":
        content = repaired(content, Meter(0))

    def read(start: int, end: int) -> bytes:
        content.seek(start)
        data: bytes = content.read(end - start)
        return jsonl_text(data, config.text_field) if format_of(path) == "jsonl" else data

    yield read
