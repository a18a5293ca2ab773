"""Records artifacts and answers where they came from.

Each `record_*` reads an artifact's own files and upserts what they say, in one transaction: recording twice is recording once, and
a lost catalog is rebuilt by recording everything that is on disk.
"""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from llm_core.checkpoint_files import CheckpointRecord, checkpoint_manifests
from llm_core.errors import DataError, UserError
from llm_core.files import read_json
from llm_core.runlog import read_metrics
from pipeline.catalog.database import Database

Row = dict[str, Any]


class Catalog:
    """The catalog of one textmill home.

    Raises (every method):
        DataError: the catalog or an artifact's file is damaged or missing; the message names it.
    """

    def __init__(self, path: Path, wait_seconds: float = 60.0) -> None:
        self._database = Database(path, wait_seconds)

    def create(self) -> None:
        """Makes an empty catalog, or brings the one there to the newest schema."""
        with self._database.connect():
            pass

    # Records, in the order of the lineage.

    def record_snapshot(self, processed_dir: Path, snapshot_id: str) -> None:
        folder = processed_dir / "snapshots"
        path = folder / f"{snapshot_id}.json"
        summary = read_json(path)
        taken_at = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).replace(tzinfo=None)
        documents = str(folder / summary["documents_table"]["file"])
        with self._database.connect() as connection:
            if _known(connection, "SELECT 1 FROM snapshots WHERE snapshot_id = ?", snapshot_id):
                return
            row = [summary[name] for name in ("files", "documents", "bytes_read", "bytes_kept")]
            connection.execute(
                "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [snapshot_id, summary["parent_snapshot_id"], taken_at, *row, *_json(summary, "bytes_dropped", "config")],
            )
            connection.execute(
                'INSERT INTO snapshot_documents SELECT ?, document_id, path, start, "end", status FROM read_parquet(?)',
                [snapshot_id, documents],
            )
            connection.execute(
                """
                INSERT INTO documents
                SELECT document_id, path, bytes, characters, split, ? FROM read_parquet(?) WHERE status = 'kept'
                ON CONFLICT DO UPDATE SET path = excluded.path, first_seen = excluded.first_seen
                WHERE excluded.first_seen < documents.first_seen
                """,
                [taken_at, documents],
            )

    def record_tokenizer(self, processed_dir: Path, tokenizer_id: str) -> None:
        report = read_json(processed_dir / "tokenizers" / f"{tokenizer_id}.report.json")
        names = ("tokenizer_type", "vocab_size", "snapshot_id", "train_bytes", "bytes_per_token", "tokens_per_word", "vocab_used")
        with self._database.connect() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO tokenizers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [tokenizer_id, *(report[name] for name in names), report["sha256"], *_json(report, "config")],
            )

    def record_dataset(self, processed_dir: Path, dataset_id: str) -> None:
        manifest = read_json(processed_dir / "manifests" / f"{dataset_id}.json")
        train, val = manifest["splits"]["train"], manifest["splits"]["val"]
        tokenizer_id = manifest["tokenizer"]["tokenizer_id"]
        with self._database.connect() as connection:
            if _known(connection, "SELECT 1 FROM datasets WHERE dataset_id = ?", dataset_id):
                return
            ids = [manifest[name] for name in ("snapshot_id",)] + [tokenizer_id, manifest["parent_dataset_id"]]
            counts = [train["tokens"], val["tokens"], train["documents"], val["documents"]]
            connection.execute(
                "INSERT INTO datasets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [dataset_id, *ids, *counts, manifest["dtype"]]
            )
            for position, shard in enumerate(manifest["shards"]):
                shard_id = shard["shard_id"]
                connection.execute(
                    "INSERT INTO dataset_shards VALUES (?, ?, ?, ?)", [dataset_id, shard_id, position, len(shard["removed_rows"])]
                )
                if _known(connection, "SELECT 1 FROM shards WHERE shard_id = ?", shard_id):
                    continue
                sizes = [shard[name] for name in ("tokens", "documents", "bytes", "file_bytes", "sha256")]
                connection.execute(
                    "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [shard_id, tokenizer_id, shard["split"], manifest["dtype"], *sizes],
                )
                connection.execute(
                    "INSERT INTO shard_documents SELECT ?, document_id, token_start, token_count FROM read_parquet(?)",
                    [shard_id, str(processed_dir / shard["facts_file"])],
                )

    def record_run(self, run_dir: Path) -> None:
        """Records a run as it stands: its state, its metrics so far, its checkpoints and the documents it reads."""
        if not (run_dir / "run.json").exists():
            return  # it failed before it began
        run = read_json(run_dir / "run.json")
        run_id = run["run_id"]
        ids = [run[name] for name in ("dataset_id", "tokenizer_id", "parent_run_id")]
        facts = [run[name] for name in ("seed", "code_version", "git_commit", "status", "error")]
        counts = [run[name] for name in ("steps_done", "tokens_seen", "skipped_steps", "parameters", "world_size", "threads")]
        machine = [run[name] for name in ("device", "precision", "attention", "torch_version")]
        row = [run_id, *ids, *_json(run, "config"), *facts, _utc(run["started_at"]), _utc(run["finished_at"]), *counts, *machine]
        metrics = read_metrics(run_dir / "metrics.jsonl")
        document_steps = run_dir / "document_steps.parquet"
        with self._database.connect() as connection:
            connection.execute(f"INSERT OR REPLACE INTO training_runs VALUES ({_marks(row)})", row)
            _insert_metrics(connection, run_id, metrics)
            _insert_checkpoints(connection, run_dir, metrics)
            if document_steps.exists() and not _known(connection, "SELECT 1 FROM run_documents WHERE run_id = ? LIMIT 1", run_id):
                connection.execute(
                    "INSERT INTO run_documents SELECT ?, document_id, first_step FROM read_parquet(?)",
                    [run_id, str(document_steps)],
                )

    def record_evaluation(self, path: Path) -> None:
        value = read_json(path)
        ids = [value["evaluation_id"], value["checkpoint_id"], value["dataset_id"]]
        rows = [
            [*ids, entry["metric"], entry["split"], entry["source"], entry["value"], _utc(value["created_at"])]
            for entry in value["metrics"]
        ]
        with self._database.connect() as connection:
            connection.executemany("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def record_model(self, model_dir: Path) -> None:
        facts = read_json(model_dir / "textmill.json")
        ids = [facts[name] for name in ("model_id", "checkpoint_id", "run_id")]
        with self._database.connect() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?)",
                [*ids, _utc(facts["released_at"]), facts["reason"], facts["metrics"]["bits_per_byte"]],
            )

    # Questions.

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[Row]:
        """Rows of a read-only query, each a dict by column name."""
        with self._database.connect(read_only=True) as connection:
            cursor = connection.execute(sql, parameters or [])
            names = [column[0] for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def runs(self) -> list[Row]:
        """All training runs, the newest first, with their last checkpoint's judgement."""
        return self.query(
            """
            SELECT r.run_id, r.status, r.steps_done, r.tokens_seen, r.parameters, r.dataset_id, r.started_at,
                   max_by(c.checkpoint_id, c.step) AS checkpoint_id, min(e.value) AS bits_per_byte
            FROM training_runs r
            LEFT JOIN checkpoints c USING (run_id)
            LEFT JOIN evaluations e ON e.checkpoint_id = c.checkpoint_id AND e.metric = 'bits_per_byte' AND e.source = 'all'
            GROUP BY ALL ORDER BY r.started_at DESC
            """
        )

    def lineage(self, checkpoint_id: str) -> list[Row]:
        """Everything a checkpoint was made from: a row for each place in a raw file whose text it has seen.

        Raises:
            UserError: there is no such checkpoint.
        """
        if not self.query("SELECT 1 FROM checkpoints WHERE checkpoint_id = ?", [checkpoint_id]):
            raise UserError(f"checkpoint {checkpoint_id}: not in the catalog; `SELECT checkpoint_id FROM checkpoints` lists them")
        return self.query("SELECT * FROM checkpoint_lineage WHERE checkpoint_id = ? ORDER BY path, start_byte", [checkpoint_id])

    def usage(self, document_or_path: str) -> list[Row]:
        """The checkpoints that have seen a document, given by its id, or any document of a raw file, given by its path.

        Raises:
            UserError: the catalog knows neither such a document nor such a file.
        """
        known = "SELECT DISTINCT document_id FROM snapshot_documents WHERE document_id = ? OR path = ?"
        if not self.query(known, [document_or_path, document_or_path]):
            raise UserError(
                f"{document_or_path}: neither a document id nor the path of a raw file (relative to the raw text folder)"
            )
        return self.query(
            f"""
            SELECT checkpoint_id, run_id, step, on_disk, count(*) AS documents, min(first_step) AS first_step
            FROM document_usage WHERE document_id IN ({known})
            GROUP BY ALL ORDER BY run_id, step
            """,
            [document_or_path, document_or_path],
        )


def rebuild(home: Path, path: Path) -> list[str]:
    """Makes the catalog at `path` anew from the files under `home`; the old one stays until the new one is whole.

    Returns:
        What could not be read and is therefore not in the new catalog.
    """
    fresh_path = path.with_name(path.name + ".rebuild")
    for left_behind in (fresh_path, fresh_path.with_name(fresh_path.name + ".wal")):
        left_behind.unlink(missing_ok=True)
    fresh = Catalog(fresh_path)
    problems = []
    processed, checkpoints, models = home / "processed_data", home / "checkpoints", home / "models"
    with Database(path).exclusive():
        fresh.create()
        for record, arguments in [
            *((fresh.record_snapshot, (processed, p.stem)) for p in _artifacts(processed / "snapshots", "*.json")),
            *(
                (fresh.record_tokenizer, (processed, p.name.split(".")[0]))
                for p in _artifacts(processed / "tokenizers", "*.report.json")
            ),
            *((fresh.record_dataset, (processed, p.stem)) for p in _artifacts(processed / "manifests", "*.json")),
            *((fresh.record_run, (p.parent,)) for p in _artifacts(checkpoints, "*/run.json")),
            *((fresh.record_evaluation, (p,)) for p in _artifacts(checkpoints, "*/evaluation_step_*.json")),
            *((fresh.record_model, (p.parent,)) for p in _artifacts(models, "*/textmill.json")),
        ]:
            try:
                record(*arguments)  # type: ignore[operator]
            except (DataError, KeyError, OSError, duckdb.Error) as error:
                problems.append(f"{arguments[-1]}: {error}")
        path.with_name(path.name + ".wal").unlink(missing_ok=True)  # belongs to the old file, would spoil the new one
        os.replace(fresh_path, path)
        fresh_path.with_name(fresh_path.name + ".lock").unlink(missing_ok=True)
    return problems


def _artifacts(folder: Path, pattern: str) -> list[Path]:
    """Manifests in the order they were written, so that what was first seen stays first seen."""
    found = [path for path in folder.glob(pattern) if path.name != "current.json"]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))


_METRICS = pa.schema(
    [
        ("run_id", pa.string()),
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("grad_norm", pa.float64()),
        ("tokens_per_second", pa.float64()),
        ("skipped", pa.bool_()),
        ("val_loss", pa.float64()),
        ("val_bits_per_byte", pa.float64()),
    ]
)


def _insert_metrics(connection: duckdb.DuckDBPyConnection, run_id: str, metrics: list[Row]) -> None:
    """Replaces a run's metrics; a step's training and validation lines become one row."""
    steps: dict[int, Row] = {}
    for line in metrics:
        if line["kind"] in ("train", "eval"):
            steps.setdefault(line["step"], {"run_id": run_id}).update(line)
    connection.execute("DELETE FROM train_metrics WHERE run_id = ?", [run_id])
    connection.register("new_metrics", pa.Table.from_pylist(list(steps.values()), _METRICS))
    connection.execute("INSERT INTO train_metrics SELECT * FROM new_metrics")
    connection.unregister("new_metrics")


def _insert_checkpoints(connection: duckdb.DuckDBPyConnection, run_dir: Path, metrics: list[Row]) -> None:
    """Those that the metrics tell of, deleted ones included, and those on disk."""
    names = ("checkpoint_id", "run_id", "step", "tokens_seen", "sha256", "bytes", "val_loss")
    found = {line["checkpoint_id"]: line | {"on_disk": False} for line in metrics if line["kind"] == "checkpoint"}
    for path in checkpoint_manifests(run_dir):
        record = CheckpointRecord.read(path)
        found[record.checkpoint_id] = vars(record) | {"on_disk": True}
    for checkpoint in found.values():
        checkpoint_id, run_id, step, tokens_seen, sha256, size, val_loss = (checkpoint[name] for name in names)
        path = f"{run_dir.name}/checkpoint_step_{step}.pt"
        connection.execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [checkpoint_id, run_id, step, tokens_seen, path, sha256, size, val_loss, checkpoint["on_disk"]],
        )


def _known(connection: duckdb.DuckDBPyConnection, sql: str, identifier: str) -> bool:
    return connection.execute(sql, [identifier]).fetchone() is not None


def _json(value: Row, *names: str) -> list[str]:
    return [json.dumps(value[name], sort_keys=True) for name in names]


def _utc(text: str | None) -> datetime.datetime | None:
    return None if text is None else datetime.datetime.fromisoformat(text).astimezone(datetime.UTC).replace(tzinfo=None)


def _marks(row: list[Any]) -> str:
    return ", ".join("?" * len(row))
