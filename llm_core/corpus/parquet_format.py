"""Parquet: one column of text, read row by row.

Only the text column counts as content: "bytes read" are the UTF-8 bytes of its values. The hash covers the values in order, each
preceded by its length, so that rewriting a file with another compression does not change it. `start` of a document is its row
number over all row groups, from 0; `end` is the next number.
"""

import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_core.config import CorpusConfig
from llm_core.corpus.documents import rejected, split_text
from llm_core.corpus.streams import BLOCK, Content, Meter, is_compressed
from llm_core.corpus.types import Document, Quarantine
from llm_core.errors import DataError

# Uncompressed bytes of text in one row group; a file with more is quarantined.
MAX_ROW_GROUP_BYTES = 4 << 30

# Memory of one batch of rows is at most this, or that of its row group; see `ParquetTexts._rows_per_batch`.
_BATCH_BYTES = 128 << 20
_BATCH_ROWS = 1024

_NULL_LENGTH = 2**64 - 1


def parquet_documents(raw: IO[bytes], path: str, config: CorpusConfig, meter: Meter) -> Iterator[Document]:
    """The documents of a Parquet file; a row without usable text is quarantined by itself.

    Raises:
        Quarantine: there is no such column, the file is damaged, or a row group is too large.
    """
    with ParquetTexts.open(raw, path, config, meter) as texts:
        for row, value in enumerate(texts.values()):
            meter.mark((_NULL_LENGTH if value is None else len(value)).to_bytes(8, "little"))
            meter.add(value or b"")
            try:
                text = _usable(value)
            except Quarantine as quarantine:
                yield rejected(value or b"", path, row, row + 1, config, quarantine.reason)
                continue
            yield from split_text(text, path, row, row + 1, config)


@dataclass
class _Span:
    """Adjacent row groups that are read together: to begin reading one takes as long as a hundred rows."""

    first_row: int
    groups: list[int]
    rows: int
    size: int  # uncompressed bytes of the text


class ParquetTexts:
    """The text column of an open Parquet file; reading rows in ascending order is fastest."""

    def __init__(self, raw: IO[bytes], config: CorpusConfig, meter: Meter) -> None:
        """Raises Quarantine if the file is unusable. The meter counts repairs."""
        self._text_field = text_field = config.text_field
        self._meter = meter if config.invalid_utf8 == "replace" else None
        self._raw = raw
        self._file = self._open()
        schema = self._file.schema_arrow
        if text_field not in schema.names:
            raise Quarantine("no_text_field", f"no column {text_field!r} among {', '.join(schema.names)[:200]}")
        kind = schema.types[schema.names.index(text_field)]
        if not _is_text(kind):
            raise Quarantine("no_text_field", f"the column {text_field!r} holds {kind}, not strings")
        self._spans = self._find_spans()
        self._values: Iterator[bytes | None] = iter(())
        self._next_row, self._span = 0, -1

    @classmethod
    @contextmanager
    def open(cls, raw: IO[bytes], path: str, config: CorpusConfig, meter: Meter) -> Iterator["ParquetTexts"]:
        """Opens a file. A compressed one is unpacked into a temporary file, since Parquet is read from its end.

        Raises:
            Quarantine: the file is damaged or a decompression bomb.
            DataError: there is no space for the temporary file.
        """
        if not is_compressed(path):
            yield cls(raw, config, meter)
            return
        packed = Meter(raw.seek(0, 2))
        content = Content(raw, path, packed)
        with tempfile.TemporaryFile() as unpacked:
            while block := content.read(BLOCK):
                try:
                    unpacked.write(block)
                except OSError as error:
                    raise DataError(
                        f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({error.strerror}); make room or set TMPDIR"
                    ) from None
            meter.damage = packed.damage
            yield cls(unpacked, config, meter)

    def values(self, first_span: int = 0) -> Iterator[bytes | None]:
        """The bytes of every row from a span on, repaired if configured; None for null."""
        for span in self._spans[first_span:]:
            with _arrow_errors():
                rows = self._rows_per_batch(span)
                for batch in self._file.iter_batches(rows, span.groups, [self._text_field], use_threads=False):
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    values = column.cast(pa.large_binary()).to_pylist()
                    yield from values if self._meter is None else (_repaired(value, self._meter) for value in values)

    def text(self, row: int) -> bytes:
        """The text of one row.

        Raises:
            Quarantine: the row has no usable text.
        """
        span = bisect_right(self._spans, row, key=lambda span: span.first_row) - 1
        if span < 0:
            raise Quarantine("no_text_field", "no rows")
        if span != self._span or row < self._next_row:
            self._values, self._next_row, self._span = self.values(span), self._spans[span].first_row, span
        for value in self._values:
            self._next_row += 1
            if self._next_row > row:
                return _usable(value)
        raise Quarantine("no_text_field", f"no row {row}")

    def _open(self, **options: Any) -> pq.ParquetFile:
        with _arrow_errors():
            # Buffered: the column of a row group is read page by page.
            return pq.ParquetFile(self._raw, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True, **options)

    def _find_spans(self) -> list[_Span]:
        with _arrow_errors():
            metadata = self._file.metadata
            paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        self._columns = [number for number, path in enumerate(paths) if path == self._text_field]
        spans: list[_Span] = []
        first_row = 0
        for number in range(metadata.num_row_groups):
            with _arrow_errors():
                group = metadata.row_group(number)
                rows, size = group.num_rows, sum(group.column(column).total_uncompressed_size for column in self._columns)
            if size > MAX_ROW_GROUP_BYTES:
                raise Quarantine(
                    "row_group_too_large", f"{size} bytes of text in row group {number}, at most {MAX_ROW_GROUP_BYTES}"
                )
            if spans and (spans[-1].size + size) * _BATCH_ROWS <= _BATCH_BYTES:
                spans[-1].groups.append(number)
                spans[-1].rows += rows
                spans[-1].size += size
            else:
                spans.append(_Span(first_row, [number], rows, size))
            first_row += rows
        return spans

    def _rows_per_batch(self, span: _Span) -> int:
        """A batch has room for the rows of a span if they are of average length, and for as many copies of the longest value that
        a few bytes can repeat in every row."""
        if span.size * min(span.rows, _BATCH_ROWS) <= _BATCH_BYTES:
            return _BATCH_ROWS
        longest = max(1, span.size // span.rows, self._longest_repeated_value(span))
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // longest))

    def _longest_repeated_value(self, span: _Span) -> int:
        """Bytes of the longest value in the dictionary of a span of one row group."""
        group = self._file.metadata.row_group(span.groups[0])
        encodings = {encoding for column in self._columns for encoding in group.column(column).encodings}
        if "DELTA_BYTE_ARRAY" in encodings:  # values share their beginnings: a long one may be repeated without a dictionary
            return span.size
        if not any("DICTIONARY" in encoding for encoding in encodings):
            return 0
        file = self._open(metadata=self._file.metadata, read_dictionary=[self._text_field])
        first = next(file.iter_batches(1, span.groups, [self._text_field], use_threads=False), None)
        return 0 if first is None else pc.max(pc.binary_length(first.column(0).dictionary)).as_py() or 0


def _repaired(value: bytes | None, meter: Meter) -> bytes | None:
    if value is None:
        return None
    text = value.decode(errors="replace")
    meter.replaced += len(text) - len(value.decode(errors="ignore"))
    return text.encode()


def _usable(value: bytes | None) -> bytes:
    if value is None:
        raise Quarantine("no_text_field", "null")
    if b"\0" in value:
        raise Quarantine("binary", "NUL in it")
    try:
        value.decode()
    except UnicodeDecodeError as error:
        raise Quarantine("not_utf8", error.reason) from None
    return value


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


@contextmanager
def _arrow_errors() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk, not of the format
            raise
        raise Quarantine("unreadable_parquet", str(error).partition("\n")[0][:200]) from None
