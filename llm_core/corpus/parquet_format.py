"""Parquet: one column of text, read row by row.

Only the text column counts as content: "bytes read" are the UTF-8 bytes of its values. The hash covers the values in order, each
preceded by its length, so that rewriting a file with another compression does not change it. `start` of a document is its row
number over all row groups, from 0; `end` is the next number.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from llm_core.config import CorpusConfig
from llm_core.corpus.documents import rejected, split_text
from llm_core.corpus.streams import BLOCK, Content, Meter, is_compressed
from llm_core.corpus.types import Document, Quarantine
from llm_core.errors import DataError

# Uncompressed bytes of text in one row group; a file with more is quarantined.
MAX_ROW_GROUP_BYTES = 4 << 30

# Memory of one batch of rows is at most this, or that of its row group; see `ParquetTexts.values`.
_BATCH_BYTES = 256 << 20
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


class ParquetTexts:
    """The text column of an open Parquet file; reading rows in ascending order is fastest."""

    def __init__(self, raw: IO[bytes], config: CorpusConfig, meter: Meter) -> None:
        """Raises Quarantine if the file is unusable. The meter counts repairs."""
        self._text_field = text_field = config.text_field
        self._meter = meter if config.invalid_utf8 == "replace" else None
        with _arrow_errors():
            # Buffered: the column of a row group is read page by page.
            self._file = pq.ParquetFile(raw, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True)
            schema = self._file.schema_arrow
        if text_field not in schema.names:
            raise Quarantine("no_text_field", f"no column {text_field!r} among {', '.join(schema.names)[:200]}")
        kind = schema.types[schema.names.index(text_field)]
        if not _is_text(kind):
            raise Quarantine("no_text_field", f"the column {text_field!r} holds {kind}, not strings")
        self._groups = [self._size_of(number) for number in range(self._file.num_row_groups)]
        for number, (_, size) in enumerate(self._groups):
            if size > MAX_ROW_GROUP_BYTES:
                raise Quarantine(
                    "row_group_too_large", f"{size} bytes of text in row group {number}, at most {MAX_ROW_GROUP_BYTES}"
                )
        self._values: Iterator[bytes | None] = iter(())
        self._next_row = self._group_end = 0

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
        content = Content(raw, path, Meter(raw.seek(0, 2)))
        with tempfile.TemporaryFile() as unpacked:
            while block := content.read(BLOCK):
                try:
                    unpacked.write(block)
                except OSError as error:
                    raise DataError(
                        f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({error.strerror}); make room or set TMPDIR"
                    ) from None
            yield cls(unpacked, config, meter)

    def values(self, first_group: int = 0) -> Iterator[bytes | None]:
        """The bytes of every row from a row group on, repaired if configured; None for null."""
        for number in range(first_group, len(self._groups)):
            # A value can be as long as its row group, and a dictionary can repeat it in every row.
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, self._groups[number][1])))
            with _arrow_errors():
                for batch in self._file.iter_batches(rows, [number], [self._text_field], use_threads=False):
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
        if not self._next_row <= row < self._group_end:
            first = 0
            for number, (rows, _) in enumerate(self._groups):
                if row < first + rows:
                    self._values, self._next_row, self._group_end = self.values(number), first, first + rows
                    break
                first += rows
        for value in self._values:
            self._next_row += 1
            if self._next_row > row:
                return _usable(value)
        raise Quarantine("no_text_field", f"no row {row}")

    def _size_of(self, group: int) -> tuple[int, int]:
        """Rows of a row group, and the uncompressed bytes of its text."""
        with _arrow_errors():
            metadata = self._file.metadata.row_group(group)
            columns = (metadata.column(number) for number in range(metadata.num_columns))
            sizes = (column.total_uncompressed_size for column in columns if column.path_in_schema == self._text_field)
            return metadata.num_rows, sum(sizes)


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
