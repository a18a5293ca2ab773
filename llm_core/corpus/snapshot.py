"""The content of a folder of text at one moment: an immutable, content-addressed list of its files and documents.

snapshots/<snapshot_id>.files.parquet      one row per file
snapshots/<snapshot_id>.documents.parquet  one row per document, ordered by (path, start, text_start)
snapshots/<snapshot_id>.json               totals and the digests of both tables; written last
snapshots/file_index.parquet               size, times, inode and version of each file at the last scan: a cache
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.config import MIN_DOCUMENT_BYTES, CorpusConfig
from llm_core.corpus.deduplication import check_available, mark_duplicates, mark_near_duplicates
from llm_core.corpus.documents import fraction_for_both_splits
from llm_core.corpus.input_folder import InputDir, InputFolder, open_input_folder
from llm_core.corpus.local_folder import LocalFolder
from llm_core.corpus.readers import iter_texts, read_file
from llm_core.corpus.summary import (
    LISTED_EXTENSIONS,
    LISTED_FOLDERS,
    QuarantineEntry,
    ScanCounts,
    SnapshotSummary,
    SnapshotTotals,
    TableFile,
    byte_totals,
    documents_dropped,
    file_changes,
    quarantine,
    quarantine_entries,
    remedy_for,
    skipped_entries,
)
from llm_core.corpus.types import (
    DOCUMENTS_SCHEMA,
    FILES_SCHEMA,
    KEPT,
    READABLE,
    UNREADABLE,
    FileRecord,
    FolderListing,
    Rows,
    Stamp,
)
from llm_core.errors import DataError, UserError
from llm_core.layout import PreparedData
from llm_core.system import (
    atomic_writer,
    content_id,
    infrequent_garbage_collection,
    inside,
    parquet_bytes,
    read_json,
    read_parquet,
    verify_file,
    write_json,
)

FORMAT_VERSION = 2

# Of the readers. Files of the same times are read again once it increases; where they then differ, so does the snapshot's id.
_READER_VERSION = "3"

_SCAN_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "inode": pa.uint64(),
        "ctime_ns": pa.int64(),
        "tag": pa.string(),
    }
)
# Seconds. Two writes to a file within one tick of the file system's clock (at most 10 ms) can leave the same times.
_CLOCK_TICK = 0.02


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's summary and tables. The summary's counts of changes and skipped files are those of the last scan."""

    summary: SnapshotSummary
    files: pa.Table
    documents: pa.Table

    @property
    def snapshot_id(self) -> str:
        return self.summary["snapshot_id"]

    @property
    def config(self) -> CorpusConfig:
        """The configuration that `iter_texts` needs to find the documents again."""
        return CorpusConfig.model_validate(self.summary["config"])

    def quarantined(self) -> list[QuarantineEntry]:
        """All that is quarantined, of which the summary has the first entries."""
        return quarantine_entries(self.files, self.documents)

    def kept_documents(self) -> pa.Table:
        """Rows of the documents of the corpus, in order."""
        return self.documents.filter(pc.equal(self.documents["status"], KEPT))


@dataclass(frozen=True)
class _Scan:
    """The files of the folder, and which of them need not be read."""

    listing: FolderListing
    last: tuple[str | None, dict[str, Stamp]]  # the previous scan, as `load_scan` returns it
    parent: Snapshot | None  # its snapshot
    unchanged: dict[str, FileRecord]  # records in the parent of files that have not changed since


@infrequent_garbage_collection()
def take_snapshot(
    input_dir: InputDir,
    data_dir: Path,
    config: CorpusConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Snapshot:
    """Reads the new files of `input_dir` and returns the snapshot of all files; `on_progress` gets (done files, all files).

    A file whose size, times and inode (for a URL, its version) are those of the last scan is not opened. The same content and
    configuration give the same snapshot, which is then not written again.

    Raises:
        UserError: the folder is missing, has no text, or all text is on one side of the train/validation split.
        DataError: a file kept changing while it was read, or the folder cannot be reached.
    """
    folder = open_input_folder(input_dir)
    scan = _scan(folder, input_dir, data_dir, config)
    records, new_documents = _read_new_files(folder, scan, config, on_progress)
    snapshot_id = content_id(FORMAT_VERSION, config.identity(), [(file.path, file.sha256, file.status) for file in records])
    files = Rows(FILES_SCHEMA, records).table()
    is_parent = scan.parent is not None and scan.parent.snapshot_id == snapshot_id
    snapshot = scan.parent if is_parent else _find_intact(data_dir, snapshot_id)
    if snapshot is not None:
        snapshot = replace(snapshot, summary={**snapshot.summary, **_scan_counts(scan, files)})
    else:
        documents = _documents_table(scan, new_documents, input_dir, data_dir, config)
        totals = _totals(snapshot_id, config, scan, files, documents)
        _check_usable(input_dir, config, totals, documents)
        snapshot = _publish(data_dir, totals, files, documents)
    # The stamps from before the files were read: a file that changed in between is read again next time.
    stamps = {file.path: scan.listing.files[file.path] for file in records if file.status != UNREADABLE}
    if scan.last != (snapshot_id, stamps):
        save_scan(data_dir, snapshot_id, stamps)
    return snapshot


def _scan(folder: InputFolder, input_dir: InputDir, data_dir: Path, config: CorpusConfig) -> _Scan:
    """Lists the files and finds those that are as the last scan left them."""
    if isinstance(folder, LocalFolder) and data_dir.resolve().is_relative_to(folder.root.resolve()):
        raise UserError(f"--output_dir {data_dir}: is inside --input_dir {input_dir} and would be read as text; name another one")
    if config.near_duplicates is not None:
        check_available(config.near_duplicates)
    listing = folder.walk()
    if not listing.files:
        remedy = ", such as the one that a link leads to; a bind mount or a copy works as well"
        raise UserError(
            f"--input_dir {input_dir}: no {READABLE} file in it, nor one of these with .gz or .zst"
            f" ({_other_files(listing)}); put text files there or name another folder"
            f"{remedy if listing.skipped['link_to_folder'] else ''}"
        )
    wait_for_mtime_resolution(listing.files.values())
    parent_id, stamps = last = load_scan(data_dir)
    parent = _find_intact(data_dir, parent_id) if parent_id else None
    unchanged = {}
    if parent is not None and parent.summary["config"] == config.identity():
        same = {path for path, stamp in listing.files.items() if stamps.get(path) == stamp}
        records = (FileRecord(**row) for row in parent.files.to_pylist())
        unchanged = {record.path: record for record in records if record.path in same}
    return _Scan(listing, last, parent, unchanged)


def _other_files(listing: FolderListing) -> str:
    most = ", ".join(f"{count} {extension}" for extension, count in listing.ignored.most_common(3))
    reasons = ", ".join(skipped_entries(listing.skipped))
    ignored, skipped = listing.ignored.total(), listing.skipped.total()
    return f"{ignored} other files{f': {most}' if most else ''}; {skipped} skipped{f': {reasons}' if reasons else ''}"


def _read_new_files(
    folder: InputFolder, scan: _Scan, config: CorpusConfig, on_progress: Callable[[int, int], None] | None
) -> tuple[list[FileRecord], Rows]:
    """Records of all files, and the documents of those that were read."""
    records: list[FileRecord] = []
    new_documents = Rows(DOCUMENTS_SCHEMA)
    for done, path in enumerate(scan.listing.files, start=1):
        record = scan.unchanged.get(path)
        if record is None:
            record, documents = read_file(folder, path, scan.listing.files[path].size, config)
            new_documents.extend(documents)
        records.append(record)
        if on_progress:
            on_progress(done, len(scan.listing.files))
    return records, new_documents


def _documents_table(scan: _Scan, new_documents: Rows, input_dir: InputDir, data_dir: Path, config: CorpusConfig) -> pa.Table:
    """New documents and those of unchanged files, sorted, with duplicates marked."""
    tables = [new_documents.table()]
    if scan.parent:
        unchanged = pa.array(scan.unchanged, pa.string())
        tables.append(scan.parent.documents.filter(pc.is_in(scan.parent.documents["path"], value_set=unchanged)))
    documents = mark_duplicates(pa.concat_tables(tables))
    if config.near_duplicates is None:
        return documents
    return mark_near_duplicates(documents, config.near_duplicates, data_dir, lambda rows: iter_texts(input_dir, rows, config))


def _scan_counts(scan: _Scan, files: pa.Table) -> ScanCounts:
    changes = file_changes(files, scan.parent.files if scan.parent else None)
    return {
        "files_ignored": scan.listing.ignored.total(),
        "ignored_by_extension": dict(scan.listing.ignored.most_common(LISTED_EXTENSIONS)),
        "files_skipped": dict(scan.listing.skipped),
        "unreadable_folders": sorted(scan.listing.unreadable_folders)[:LISTED_FOLDERS],
        **changes,
    }


def _totals(snapshot_id: str, config: CorpusConfig, scan: _Scan, files: pa.Table, documents: pa.Table) -> SnapshotTotals:
    return {
        "format_version": FORMAT_VERSION,
        "snapshot_id": snapshot_id,
        "config": config.identity(),
        "parent_snapshot_id": scan.parent.snapshot_id if scan.parent else None,
        "files": files.num_rows,
        "documents": pc.sum(pc.equal(documents["status"], KEPT)).as_py() or 0,
        **_scan_counts(scan, files),
        **byte_totals(files, documents),
        **quarantine(files, documents),
    }


def _check_usable(input_dir: InputDir, config: CorpusConfig, totals: SnapshotTotals, documents: pa.Table) -> None:
    if not totals["documents"]:
        reasons = sorted(totals["bytes_dropped"])
        dropped = ", ".join(f"{reason} {totals['bytes_dropped'][reason]} bytes" for reason in reasons)
        remedies = ", ".join(remedy for reason in reasons if (remedy := remedy_for(reason, totals)))
        raise UserError(
            f"--input_dir {input_dir}: no usable text in its {totals['files']} files ({dropped or 'all empty'});"
            f" {f'try {remedies}' if remedies else 'add text files'}"
        )
    for split, split_bytes in (("train", totals["train_bytes"]), ("val", totals["val_bytes"])):
        if not split_bytes:
            raise UserError(
                f"--val_fraction {config.val_fraction}: none of the {totals['documents']} documents"
                f" ({totals['bytes_kept']} bytes) falls to {split}; {_split_advice(documents, config)}"
            )


def _split_advice(documents: pa.Table, config: CorpusConfig) -> str:
    """How to get text into both splits."""
    kept = documents.filter(pc.equal(documents["status"], KEPT))
    if (fraction := fraction_for_both_splits(kept["document_id"].to_pylist())) is not None:
        return f"give --val_fraction {fraction:g}, or add text"
    size = pc.sum(kept["bytes"]).as_py()
    if size >= 100 * MIN_DOCUMENT_BYTES and size // 100 < config.max_document_bytes:
        return f"give --max_document_bytes {size // 100}, which makes about 100 documents, or add text"
    return "add text"


def _publish(data_dir: Path, totals: SnapshotTotals, files: pa.Table, documents: pa.Table) -> Snapshot:
    folder, snapshot_id = PreparedData(data_dir), totals["snapshot_id"]
    summary: SnapshotSummary = {
        **totals,
        "files_table": _write_table(folder.snapshot_files(snapshot_id), files),
        "documents_table": _write_table(folder.snapshot_documents(snapshot_id), documents),
    }
    write_json(folder.snapshot(snapshot_id), summary)
    return Snapshot(summary, files, documents)


def _write_table(path: Path, table: pa.Table) -> TableFile:
    with atomic_writer(path) as file:
        file.write(parquet_bytes(table))
        return {"file": path.name, "sha256": file.sha256()}


def load_snapshot(data_dir: Path, snapshot_id: str) -> Snapshot:
    """Opens a snapshot.

    Raises:
        DataError: one of its files is missing or damaged.
    """
    folder, summary = PreparedData(data_dir), read_summary(data_dir, snapshot_id)
    if summary.get("format_version") != FORMAT_VERSION:
        path, found = folder.snapshot(snapshot_id), summary.get("format_version")
        raise DataError(f"{path}: format version {found}, this program reads {FORMAT_VERSION}")
    tables = []
    for entry in (summary["files_table"], summary["documents_table"]):
        table = inside(folder.snapshot(snapshot_id).parent, entry["file"])
        verify_file(table, entry["sha256"])
        tables.append(read_parquet(table))
    files, documents = tables
    if "documents_dropped" not in summary:  # of an older version
        summary["documents_dropped"] = documents_dropped(files, documents)
    return Snapshot(summary, files, documents.cast(DOCUMENTS_SCHEMA))  # older versions stored plain strings


def read_summary(data_dir: Path, snapshot_id: str) -> SnapshotSummary:
    """The summary of a snapshot of any format version, without its tables.

    Raises:
        DataError: the file is missing or damaged.
    """
    return cast(SnapshotSummary, read_json(PreparedData(data_dir).snapshot(snapshot_id)))


def _find_intact(data_dir: Path, snapshot_id: str) -> Snapshot | None:
    """A snapshot if it exists undamaged; otherwise its files are read again."""
    try:
        return load_snapshot(data_dir, snapshot_id)
    except (DataError, KeyError):
        return None


def wait_for_mtime_resolution(stamps: Iterable[Stamp]) -> None:
    """Waits until a further write to any of the files must change its times: equal stamps then mean equal content."""
    newest = max(max(stamp.mtime_ns, stamp.ctime_ns) for stamp in stamps) / 1e9
    time.sleep(max(0.0, min(newest + _CLOCK_TICK - time.time(), _CLOCK_TICK)))


def load_scan(data_dir: Path) -> tuple[str | None, dict[str, Stamp]]:
    """Id of the newest snapshot and the stamps of its files, {} if other readers read them; (None, {}) if the cache is lost."""
    try:
        index = read_parquet(PreparedData(data_dir).scan)
        snapshot_id = index.schema.metadata[b"snapshot_id"].decode()
        if index.schema.metadata.get(b"reader_version") != _READER_VERSION.encode():
            return snapshot_id, {}
        return snapshot_id, {row.pop("path"): Stamp(**row) for row in index.to_pylist()}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return None, {}


def save_scan(data_dir: Path, snapshot_id: str, stamps: dict[str, Stamp]) -> None:
    """Stores the stamps of the files that could be read."""
    rows = [(path, *stamp) for path, stamp in stamps.items()]
    metadata = {"snapshot_id": snapshot_id, "reader_version": _READER_VERSION}
    content = parquet_bytes(Rows(_SCAN_SCHEMA.with_metadata(metadata), rows).table())
    with atomic_writer(PreparedData(data_dir).scan) as file:
        file.write(content)
