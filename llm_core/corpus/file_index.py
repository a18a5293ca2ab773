"""The files' stamps at the last look: a cache that spares opening what did not change, never the truth.

snapshots/file_index.parquet   size, times, inode and version of every file, and the id of the snapshot taken then
"""

import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from llm_core.corpus.folder import Stamp
from llm_core.corpus.records import Rows
from llm_core.files import atomic_writer
from llm_core.tables import parquet_bytes, read_parquet

_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "inode": pa.uint64(),
        "ctime_ns": pa.int64(),
        "tag": pa.string(),
    }
)
_FILE = Path("snapshots", "file_index.parquet")
_CLOCK_TICK = 0.02
"""Seconds; two writes to a file within one tick of the file system's clock (10 ms at most) can leave the same times."""


def let_the_clock_tick(stamps: Iterable[Stamp]) -> None:
    """After this a further write to any of the files shows in its times, so that an equal stamp means equal content."""
    newest = max(max(stamp.mtime_ns, stamp.ctime_ns) for stamp in stamps) / 1e9
    time.sleep(max(0.0, min(newest + _CLOCK_TICK - time.time(), _CLOCK_TICK)))


def last_look(processed_dir: Path) -> tuple[str | None, dict[str, Stamp]]:
    """Id of the snapshot taken last and the files' stamps of that moment; nothing if the cache is lost or unreadable."""
    try:
        index = read_parquet(processed_dir / _FILE)
        snapshot_id = index.schema.metadata[b"snapshot_id"].decode()
        return snapshot_id, {row.pop("path"): Stamp(**row) for row in index.to_pylist()}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None, {}


def remember_look(processed_dir: Path, snapshot_id: str, stamps: dict[str, Stamp]) -> None:
    """Stores the stamps of the files that could be read."""
    rows = [(path, *stamp) for path, stamp in stamps.items()]
    content = parquet_bytes(Rows(_SCHEMA.with_metadata({"snapshot_id": snapshot_id}), rows).table())
    with atomic_writer(processed_dir / _FILE) as file:
        file.write(content)
