"""Records artifacts.

Each `record_*` reads an artifact's own files and upserts what they say, in one transaction: recording twice is recording
once, and a lost catalog is rebuilt by recording everything that is on disk.
"""

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from llm_core.checkpoint_files import CheckpointRecord, checkpoint_manifests
from llm_core.errors import DataError
from llm_core.files import inside, read_json, verify_file
from llm_core.runlog import read_metrics
from pipeline.catalog.questions import Questions, Row


class Catalog(Questions):
    """The catalog of one textmill home: what there is is recorded here, and the questions to it are inherited.

    Raises (every method):
        DataError: an artifact's file is damaged, missing or not what it should be; the message names it.
        CatalogError: the same of the catalog's own file, which a rebuild then replaces.
    """

    def create(self) -> None:
        """Makes an empty catalog, or brings the one there to the newest schema."""
        with self._database.connect():
            pass

    # Records, in the order of the lineage.

    def record_snapshot(self, processed_dir: Path, snapshot_id: str) -> None:
        folder = processed_dir / "snapshots"
        path = inside(folder, f"{snapshot_id}.json")
        with _artifact(path) as summary:
            taken_at = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).replace(tzinfo=None)
            counts = [summary[name] for name in ("files", "documents", "bytes_read", "bytes_kept")]
            row = [snapshot_id, summary["parent_snapshot_id"], taken_at, *counts, *_json(summary, "bytes_dropped", "config")]
            documents = inside(folder, summary["documents_table"]["file"])
            verify_file(documents, summary["documents_table"]["sha256"])
            with self._database.connect() as connection:
                if _known(connection, "SELECT 1 FROM snapshots WHERE snapshot_id = ?", snapshot_id):
                    return
                connection.execute(f"INSERT INTO snapshots VALUES ({_marks(row)})", row)
                connection.execute(
                    """
                    INSERT INTO snapshot_documents
                    SELECT ?, document_id, path, start, "end", status FROM read_parquet(?, hive_partitioning = false)
                    """,
                    [snapshot_id, str(documents)],
                )
                connection.execute(
                    """
                    INSERT INTO documents
                    SELECT document_id, path, bytes, characters, split, ? FROM read_parquet(?, hive_partitioning = false)
                    WHERE status = 'kept'
                    ON CONFLICT DO UPDATE SET path = excluded.path, split = excluded.split, first_seen = excluded.first_seen
                    WHERE excluded.first_seen < documents.first_seen
                    """,
                    [taken_at, str(documents)],
                )

    def record_tokenizer(self, processed_dir: Path, tokenizer_id: str) -> None:
        with _artifact(inside(processed_dir / "tokenizers", f"{tokenizer_id}.report.json")) as report:
            names = ("tokenizer_type", "vocab_size", "snapshot_id", "train_bytes", "bytes_per_token", "tokens_per_word")
            row = [tokenizer_id, *(report[name] for name in (*names, "vocab_used", "sha256")), *_json(report, "config")]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO tokenizers VALUES ({_marks(row)})", row)

    def record_dataset(self, processed_dir: Path, dataset_id: str) -> None:
        with _artifact(inside(processed_dir / "manifests", f"{dataset_id}.json")) as manifest:
            tokenizer_id, dtype = manifest["tokenizer"]["tokenizer_id"], manifest["dtype"]
            totals = [manifest["splits"][split][name] for name in ("tokens", "documents") for split in ("train", "val")]
            row = [dataset_id, manifest["snapshot_id"], tokenizer_id, manifest["parent_dataset_id"], *totals, dtype]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO datasets VALUES ({_marks(row)})", row)
                for position, shard in enumerate(manifest["shards"]):
                    shard_id = shard["shard_id"]
                    connection.execute(
                        "INSERT OR REPLACE INTO dataset_shards VALUES (?, ?, ?, ?)",
                        [dataset_id, shard_id, position, len(shard["removed_rows"])],
                    )
                    if _known(connection, "SELECT 1 FROM shards WHERE shard_id = ?", shard_id):
                        continue
                    facts = inside(processed_dir, shard["facts_file"])
                    verify_file(facts, shard["facts_sha256"])
                    sizes = [shard[name] for name in ("tokens", "documents", "bytes", "file_bytes", "sha256")]
                    connection.execute(
                        "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        [shard_id, tokenizer_id, shard["split"], dtype, *sizes],
                    )
                    connection.execute(
                        """
                        INSERT INTO shard_documents
                        SELECT ?, document_id, token_start, token_count FROM read_parquet(?, hive_partitioning = false)
                        """,
                        [shard_id, str(facts)],
                    )

    def record_run(self, run_dir: Path) -> None:
        """Records a run as it stands: its state, its metrics so far, its checkpoints and the documents it reads."""
        if not (run_dir / "run.json").exists():
            return  # it failed before it began
        steps, saved = _read_metrics(run_dir / "metrics.jsonl")
        document_steps = run_dir / "document_steps.parquet"
        with _artifact(run_dir / "run.json") as run:
            run_id = run["run_id"]
            ids = [run[name] for name in ("dataset_id", "tokenizer_id", "parent_run_id", "parent_step")]
            facts = [run[name] for name in ("seed", "code_version", "git_commit", "status", "error")]
            counts = [run[name] for name in ("steps_done", "tokens_seen", "skipped_steps", "parameters", "world_size", "threads")]
            machine = [run[name] for name in ("device", "precision", "attention", "torch_version")]
            times = [_utc(run[name]) for name in ("started_at", "finished_at")]
            row = [run_id, *ids, *_json(run, "config"), *facts, *times, *counts, *machine, run.get("snapshot_id")]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO training_runs VALUES ({_marks(row)})", row)
                _insert_metrics(connection, run_id, steps)
                _insert_checkpoints(connection, run_id, run_dir, saved)
                known = _known(connection, "SELECT 1 FROM run_documents WHERE run_id = ? LIMIT 1", run_id)
                if document_steps.exists() and not known:
                    _insert_document_steps(connection, run_id, document_steps, run["document_steps_sha256"])

    def record_evaluation(self, path: Path) -> None:
        with _artifact(path) as value:
            ids = [value[name] for name in ("evaluation_id", "checkpoint_id", "dataset_id")]
            rows = [
                [*ids, entry["metric"], entry["split"], entry["source"], entry["value"], _utc(value["created_at"])]
                for entry in value["metrics"]
            ]
            with self._database.connect() as connection:
                values = ", ".join(f"({_marks(row)})" for row in rows)  # three times as fast as row by row
                connection.execute(f"INSERT OR REPLACE INTO evaluations VALUES {values}", [cell for row in rows for cell in row])

    def record_model(self, model_dir: Path) -> None:
        with _artifact(model_dir / "textmill.json") as facts:
            ids = [facts[name] for name in ("model_id", "checkpoint_id", "run_id")]
            row = [*ids, _utc(facts["released_at"]), facts["reason"], facts["metrics"]["bits_per_byte"]]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO models VALUES ({_marks(row)})", row)


_CHECKPOINT = ("checkpoint_id", "run_id", "step", "tokens_seen", "sha256", "bytes", "val_loss")
_METRICS = pa.schema(
    [
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("grad_norm", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("skipped", pa.bool_()),
        ("val_loss", pa.float64()),
        ("val_bits_per_byte", pa.float64()),
        ("mfu", pa.float64()),
    ]
)


def _read_metrics(path: Path) -> tuple[pa.Table, list[Row]]:
    """The steps of a run, a step's training and validation lines in one row, and the checkpoints it told of."""
    with _naming(path):
        lines = read_metrics(path)
        steps: dict[int, Row] = {}
        for line in lines:
            if line["kind"] in ("train", "eval"):
                steps.setdefault(line["step"], {}).update(line)
        saved = [{name: line[name] for name in _CHECKPOINT} for line in lines if line["kind"] == "checkpoint"]
        return pa.Table.from_pylist(list(steps.values()), _METRICS), saved


def _insert_metrics(connection: duckdb.DuckDBPyConnection, run_id: str, steps: pa.Table) -> None:
    connection.execute("DELETE FROM train_metrics WHERE run_id = ?", [run_id])
    connection.register("new_metrics", steps)
    connection.execute("INSERT INTO train_metrics SELECT ?, * FROM new_metrics", [run_id])


def _insert_checkpoints(connection: duckdb.DuckDBPyConnection, run_id: str, run_dir: Path, saved: list[Row]) -> None:
    """Those that the metrics tell of, deleted ones included, and those on disk."""
    found = {row["checkpoint_id"]: row | {"on_disk": False} for row in saved}
    for manifest in checkpoint_manifests(run_dir):
        try:
            record = CheckpointRecord.read(manifest)
        except DataError:
            continue  # a checkpoint without a sound manifest does not exist
        found[record.checkpoint_id] = vars(record) | {"on_disk": record.path.is_file()}
    # Those that neither knows any more were passed over as damaged by a resumed run.
    connection.execute("UPDATE checkpoints SET on_disk = false WHERE run_id = ?", [run_id])
    for checkpoint in found.values():
        checkpoint_id, owner, step, tokens_seen, sha256, size, val_loss = (checkpoint[name] for name in _CHECKPOINT)
        path = f"{run_dir.name}/checkpoint_step_{step}.pt"
        connection.execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [checkpoint_id, owner, step, tokens_seen, path, sha256, size, val_loss, checkpoint["on_disk"]],
        )


def _insert_document_steps(connection: duckdb.DuckDBPyConnection, run_id: str, path: Path, sha256: str) -> None:
    try:
        verify_file(path, sha256)
    except DataError as error:
        raise DataError(f"{error}; resuming the run writes it anew") from None
    connection.execute(
        "INSERT INTO run_documents SELECT ?, document_id, first_step FROM read_parquet(?, hive_partitioning = false)",
        [run_id, str(path)],
    )


@contextmanager
def _artifact(path: Path) -> Iterator[Row]:
    """An artifact's JSON file, blamed for whatever goes wrong in the block."""
    with _naming(path):
        yield read_json(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes one DataError that names the file of whatever does not fit in it."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path}: damaged, field {error} is missing") from error
    except (TypeError, ValueError, AttributeError, duckdb.Error) as error:
        raise DataError(f"{path}: not what the catalog expects ({error})") from error


def _known(connection: duckdb.DuckDBPyConnection, sql: str, identifier: str) -> bool:
    return connection.execute(sql, [identifier]).fetchone() is not None


def _json(value: Row, *names: str) -> list[str]:
    return [json.dumps(value[name], sort_keys=True) for name in names]


def _utc(text: str | None) -> datetime.datetime | None:
    return None if text is None else datetime.datetime.fromisoformat(text).astimezone(datetime.UTC).replace(tzinfo=None)


def _marks(row: list[Any]) -> str:
    return ", ".join("?" * len(row))
