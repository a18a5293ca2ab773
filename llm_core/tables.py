"""Arrow tables as file contents and as rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """A table as a Parquet file, with the options of `pq.write_table`; the same table gives the same bytes.

    Bytes first, so that they can be hashed before they are published.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return bytes(sink.getvalue().to_pybytes())


def read_parquet(path: Path, **options: Any) -> pa.Table:
    """One Parquet file as a table, with the options of `pq.ParquetFile`.

    `pq.read_table` would look for columns in the folders' names, and load pandas where it is installed: a second of start-up.
    """
    with pq.ParquetFile(path, **options) as file:
        return file.read()


def iter_rows(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of these columns, row by row; few rows are Python objects at any time."""
    for batch in table.select(columns).to_batches(max_chunksize=4096):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
