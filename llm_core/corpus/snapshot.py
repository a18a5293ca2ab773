"""What a folder of text held at one moment: an immutable, content-addressed list of its files and documents.

snapshots/<snapshot_id>.files.parquet      one row per file
snapshots/<snapshot_id>.documents.parquet  one row per document, ordered by (path, start, text_start)
snapshots/<snapshot_id>.json               totals and the digests of both tables; written last
snapshots/file_index.parquet               what tells the files' versions at the last look: a cache, never the truth
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.config import CorpusConfig
from llm_core.corpus.accounting import byte_totals, file_changes, quarantine
from llm_core.corpus.duplicates import mark_duplicates
from llm_core.corpus.file_index import last_look, let_the_clock_tick, remember_look
from llm_core.corpus.folder import READABLE, LocalFolder
from llm_core.corpus.near_duplicates import check_available, mark_near_duplicates
from llm_core.corpus.readers import iter_texts, read_file
from llm_core.corpus.records import DOCUMENTS_SCHEMA, FILES_SCHEMA, KEPT, UNREADABLE, FileFacts, Rows
from llm_core.corpus.source import InputDir, open_source
from llm_core.errors import DataError, UserError
from llm_core.files import atomic_writer, content_id, inside, read_json, verify_file, write_json
from llm_core.processes import seldom_collecting
from llm_core.tables import parquet_bytes, read_parquet

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Snapshot:
    """A snapshot's summary and its two tables. What the summary tells of changes and of files passed over is of the last look."""

    summary: dict[str, Any]
    files: pa.Table
    documents: pa.Table

    @property
    def snapshot_id(self) -> str:
        return str(self.summary["snapshot_id"])

    @property
    def config(self) -> CorpusConfig:
        """What `iter_texts` needs to find the documents again."""
        return CorpusConfig.model_validate(self.summary["config"])

    def kept_documents(self) -> pa.Table:
        """Rows of the documents that make up the corpus, in order."""
        return self.documents.filter(pc.equal(self.documents["status"], KEPT))


@seldom_collecting()
def take_snapshot(
    input_dir: InputDir,
    processed_dir: Path,
    config: CorpusConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Snapshot:
    """Reads what is new in `input_dir` and returns the snapshot of the whole; `on_progress` gets (done files, all files).

    A file whose size, times and inode (behind a URL, its version there) are those of the last look is not opened. The same
    content and configuration give the same snapshot, which is then not written again.

    Raises:
        UserError: no folder, no text in it, or nothing on one side of the train/validation split.
        DataError: a file kept changing while it was read, or its place cannot be reached.
    """
    source = open_source(input_dir)
    if isinstance(source, LocalFolder) and processed_dir.resolve().is_relative_to(source.root.resolve()):
        raise UserError(
            f"--output_dir {processed_dir}: lies in --input_dir {input_dir} and would be read as text; name another one"
        )
    if config.near_duplicates is not None:
        check_available(config.near_duplicates)
    folder = source.walk()
    if not folder.files:
        raise UserError(
            f"--input_dir {input_dir}: no {READABLE} file in it, nor one of these with .gz or .zst"
            f" ({folder.ignored} other files, {folder.skipped.total()} skipped); put text files there or name another folder"
        )
    let_the_clock_tick(folder.files.values())
    parent_id, stamps = looked = last_look(processed_dir)
    parent = _intact_snapshot(processed_dir, parent_id) if parent_id else None
    known: dict[str, FileFacts] = {}
    if parent and parent.summary["config"] == config.identity():
        rows = (FileFacts(**row) for row in parent.files.to_pylist())
        known = {row.path: row for row in rows if row.path in folder.files and stamps.get(row.path) == folder.files[row.path]}

    files: list[FileFacts] = []
    fresh = Rows(DOCUMENTS_SCHEMA)
    for done, path in enumerate(folder.files, start=1):
        if path in known:
            facts = known[path]
        else:
            facts, documents = read_file(source, path, config)
            fresh.extend(documents)
        files.append(facts)
        if on_progress:
            on_progress(done, len(folder.files))

    identity = [(facts.path, facts.sha256, facts.status) for facts in files]
    snapshot_id = content_id(FORMAT_VERSION, config.identity(), identity)
    files_table = Rows(FILES_SCHEMA, files).table()
    look = {
        "files_ignored": folder.ignored,
        "files_skipped": dict(folder.skipped),
        **file_changes(files_table, parent.files if parent else None),
    }
    snapshot = parent if parent and parent.snapshot_id == snapshot_id else _intact_snapshot(processed_dir, snapshot_id)
    if snapshot is not None:
        snapshot = replace(snapshot, summary=snapshot.summary | look)
    else:
        tables = [fresh.table()]
        if parent:
            tables.append(parent.documents.filter(pc.is_in(parent.documents["path"], value_set=pa.array(known, pa.string()))))
        documents_table = mark_duplicates(pa.concat_tables(tables))
        if config.near_duplicates is not None:
            documents_table = mark_near_duplicates(
                documents_table, config.near_duplicates, processed_dir, lambda rows: iter_texts(input_dir, rows, config)
            )
        summary = {
            "format_version": FORMAT_VERSION,
            "snapshot_id": snapshot_id,
            "config": config.identity(),
            "parent_snapshot_id": parent.snapshot_id if parent else None,
            "files": files_table.num_rows,
            "documents": pc.sum(pc.equal(documents_table["status"], KEPT)).as_py() or 0,
            **look,
            **byte_totals(files_table, documents_table),
            **quarantine(files_table, documents_table),
        }
        _check_usable(input_dir, config, summary)
        snapshot = _publish(processed_dir, summary, files_table, documents_table)
    # The stamps from before the files were read: what changed in between is looked at again.
    stamps = {facts.path: folder.files[facts.path] for facts in files if facts.status != UNREADABLE}
    if looked != (snapshot_id, stamps):
        remember_look(processed_dir, snapshot_id, stamps)
    return snapshot


def load_snapshot(processed_dir: Path, snapshot_id: str) -> Snapshot:
    """Opens a snapshot.

    Raises:
        DataError: one of its files is missing or damaged.
    """
    folder = processed_dir / "snapshots"
    path = inside(folder, f"{snapshot_id}.json")
    summary = read_json(path)
    if summary.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: format version {summary.get('format_version')}, this program reads {FORMAT_VERSION}")
    tables = []
    for entry in (summary["files_table"], summary["documents_table"]):
        table = inside(folder, entry["file"])
        verify_file(table, entry["sha256"])
        tables.append(read_parquet(table))
    files, documents = tables
    return Snapshot(summary, files, documents.cast(DOCUMENTS_SCHEMA))  # older versions stored plain strings


def _intact_snapshot(processed_dir: Path, snapshot_id: str) -> Snapshot | None:
    """A snapshot that can stand in for reading the files again; a damaged one cannot and is written anew."""
    try:
        return load_snapshot(processed_dir, snapshot_id)
    except (DataError, KeyError):
        return None


def _check_usable(input_dir: InputDir, config: CorpusConfig, summary: dict[str, Any]) -> None:
    documents, size = summary["documents"], summary["bytes_kept"]
    if not documents:
        reasons = ", ".join(f"{reason} {count} bytes" for reason, count in sorted(summary["bytes_dropped"].items()))
        raise UserError(
            f"--input_dir {input_dir}: no usable text in its {summary['files']} files ({reasons or 'all empty'});"
            f" .jsonl lines and .parquet rows need a string under --text_field {config.text_field!r}, all text needs UTF-8"
            " (or --invalid_utf8 replace)"
        )
    for split in ("train", "val"):
        if not summary[f"{split}_bytes"]:
            raise UserError(
                f"--val_fraction {config.val_fraction}: none of the {documents} documents ({size} bytes) falls to {split};"
                f" add text to {input_dir}, give another --val_fraction, or a smaller --max_document_bytes"
                f" ({config.max_document_bytes} now; {max(256, size // 100)} would make about 100 documents)"
            )


def _publish(processed_dir: Path, summary: dict[str, Any], files: pa.Table, documents: pa.Table) -> Snapshot:
    for name, table in (("files", files), ("documents", documents)):
        path = processed_dir / "snapshots" / f"{summary['snapshot_id']}.{name}.parquet"
        with atomic_writer(path) as file:
            file.write(parquet_bytes(table))
            summary[f"{name}_table"] = {"file": path.name, "sha256": file.sha256()}
    write_json(processed_dir / "snapshots" / f"{summary['snapshot_id']}.json", summary)
    return Snapshot(summary, files, documents)
