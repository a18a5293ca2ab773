"""Records artifacts.

Each `record_*` reads the files of an artifact and upserts their content in one transaction. Recording is idempotent: to rebuild a
lost catalog, everything on disk is recorded again.
"""

import datetime
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.corpus import read_summary
from llm_core.dataset import DatasetVersion
from llm_core.errors import DataError
from llm_core.evaluation import read_results
from llm_core.huggingface import ModelRecord
from llm_core.layout import ModelFolder, PreparedData, RunFolder
from llm_core.system import inside, verify_file
from llm_core.tokenizer import read_report
from llm_core.training import read_metrics
from pipeline.catalog.queries import CatalogQueries, Row


class Catalog(CatalogQueries):
    """The catalog of one textmill home: the base class queries, this class records.

    Raises (every method):
        DataError: a file of an artifact is missing, damaged or invalid; the message names it.
        CatalogError: the catalog file is damaged; a rebuild replaces it.
    """

    def create(self) -> None:
        """Creates an empty catalog, or migrates the existing one to the newest schema."""
        with self._database.connect():
            pass

    def record_snapshot(self, data_dir: Path, snapshot_id: str) -> None:
        folder = PreparedData(data_dir)
        path = folder.snapshot(snapshot_id)
        with _reading(path):
            summary: dict[str, Any] = dict(read_summary(data_dir, snapshot_id))
            taken_at = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).replace(tzinfo=None)
            counts = [summary[name] for name in ("files", "documents", "bytes_read", "bytes_kept")]
            row = [snapshot_id, summary["parent_snapshot_id"], taken_at, *counts, *_json(summary, "bytes_dropped", "config")]
            row += [json.dumps(summary[name], sort_keys=True) if name in summary else None for name in _LATER]
            documents = inside(path.parent, summary["documents_table"]["file"])
            verify_file(documents, summary["documents_table"]["sha256"])
            with self._database.connect() as connection:
                if _exists(connection, "SELECT 1 FROM snapshots WHERE snapshot_id = ?", snapshot_id):
                    return
                connection.execute(f"INSERT INTO snapshots VALUES ({_placeholders(row)})", row)
                _register(connection, "all_documents", documents)
                connection.execute(
                    'INSERT INTO snapshot_documents SELECT ?, document_id, path, start, "end", status FROM all_documents',
                    [snapshot_id],
                )
                _register(connection, "new_documents", documents)
                connection.execute(
                    """
                    INSERT INTO documents
                    SELECT document_id, path, bytes, characters, split, ? FROM new_documents
                    WHERE status = 'kept'
                    ON CONFLICT DO UPDATE SET path = excluded.path, split = excluded.split, first_seen = excluded.first_seen
                    WHERE excluded.first_seen < documents.first_seen
                    """,
                    [taken_at],
                )

    def record_tokenizer(self, data_dir: Path, tokenizer_id: str) -> None:
        with _reading(PreparedData(data_dir).tokenizer_report(tokenizer_id)):
            report = dict(read_report(data_dir, tokenizer_id))
            names = ("tokenizer_type", "vocab_size", "snapshot_id", "train_bytes", "bytes_per_token", "tokens_per_word")
            row = [tokenizer_id, *(report[name] for name in (*names, "vocab_used", "sha256")), *_json(report, "config")]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO tokenizers VALUES ({_placeholders(row)})", row)

    def record_dataset(self, data_dir: Path, dataset_id: str) -> None:
        with _reading(PreparedData(data_dir).manifest(dataset_id)):
            dataset = DatasetVersion.read(data_dir, dataset_id)
            tokenizer_id = dataset.tokenizer.tokenizer_id
            train, val = dataset.splits["train"], dataset.splits["val"]
            totals = [train.tokens, val.tokens, train.documents, val.documents]
            row = [
                dataset_id,
                dataset.snapshot_id,
                tokenizer_id,
                dataset.parent_dataset_id,
                *totals,
                dataset.dtype,
                dataset.unknown_text,
            ]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO datasets VALUES ({_placeholders(row)})", row)
                for position, shard in enumerate(dataset.shards):
                    connection.execute(
                        "INSERT OR REPLACE INTO dataset_shards VALUES (?, ?, ?, ?)",
                        [dataset_id, shard.shard_id, position, len(shard.removed_rows)],
                    )
                    if _exists(connection, "SELECT 1 FROM shards WHERE shard_id = ?", shard.shard_id):
                        continue
                    index = PreparedData(data_dir).named(shard.index_file)
                    verify_file(index, shard.index_sha256)
                    sizes = [shard.tokens, shard.documents, shard.bytes, shard.file_bytes, shard.sha256]
                    connection.execute(
                        "INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        [shard.shard_id, tokenizer_id, shard.split, dataset.dtype, *sizes],
                    )
                    _register(connection, "new_shard", index)
                    connection.execute(
                        "INSERT INTO shard_documents SELECT ?, document_id, token_start, token_count FROM new_shard",
                        [shard.shard_id],
                    )

    def record_run(self, run_dir: Path) -> None:
        """Records the current state of a run, its metrics so far, its checkpoints and the documents it reads."""
        folder = RunFolder(run_dir)
        run = RunRecord.find(run_dir)
        if run is None:
            return  # it failed before it started
        steps, saved = _read_metrics(folder.metrics)
        with _reading(folder.record):
            ids = [run.dataset_id, run.tokenizer_id, run.parent_run_id, run.parent_step]
            config = json.dumps(run.train_config(run_dir), sort_keys=True)
            code = [run.seed, run.code_version, run.git_commit]
            state = [run.status, run.error, _utc(run.started_at), _utc(run.finished_at)]
            counts = [run.steps_done, run.tokens_seen, run.skipped_steps, run.parameters, run.world_size, run.threads]
            machine = [run.device, run.precision, run.attention, run.torch_version]
            row = [run.run_id, *ids, config, *code, *state, *counts, *machine, run.snapshot_id, _utc(run.removed_at)]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO training_runs VALUES ({_placeholders(row)})", row)
                _insert_metrics(connection, run.run_id, steps)
                _insert_checkpoints(connection, run.run_id, run_dir, saved)
                recorded = _exists(connection, "SELECT 1 FROM run_documents WHERE run_id = ? LIMIT 1", run.run_id)
                if not recorded and run.document_steps_sha256 is not None and folder.document_steps.exists():
                    _insert_document_steps(connection, run.run_id, folder.document_steps, run.document_steps_sha256)

    def record_evaluation(self, path: Path) -> None:
        """Records the metrics of an evaluation on held-out text or on tasks."""
        with _reading(path):
            results: Any = read_results(path)
            if "figures" in results:  # lm-eval tasks have no dataset; their names are sources
                dataset_id, column, entries = "lm_eval", "task", results["figures"]
            else:
                dataset_id, column, entries = results["dataset_id"], "source", results["metrics"]
            ids, when = [results["evaluation_id"], results["checkpoint_id"], dataset_id], _utc(results["created_at"])
            text_id = results.get("text_id")
            rows = [[*ids, *(entry[name] for name in ("metric", "split", column, "value")), when, text_id] for entry in entries]
            with self._database.connect() as connection:
                values = ", ".join(f"({_placeholders(row)})" for row in rows)  # one statement: three times as fast as row by row
                connection.execute(f"INSERT OR REPLACE INTO evaluations VALUES {values}", [cell for row in rows for cell in row])

    def record_model(self, model_dir: Path) -> None:
        with _reading(ModelFolder(model_dir).record):
            model = ModelRecord.read(model_dir)
            ids = [model.model_id, model.checkpoint_id, model.run_id]
            row = [*ids, _utc(model.released_at), model.reason, model.metrics["bits_per_byte"], _utc(model.removed_at)]
            with self._database.connect() as connection:
                connection.execute(f"INSERT OR REPLACE INTO models VALUES ({_placeholders(row)})", row)


# Fields of a snapshot's summary that older versions did not write.
_LATER = ("documents_dropped", "ignored_by_extension", "files_skipped")

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
    """A row per step, with its training and validation metrics, and the checkpoints in the metrics."""
    with _reading(path):
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
    """Inserts the checkpoints in the metrics, deleted ones included, and those on disk."""
    checkpoints = {row["checkpoint_id"]: row | {"on_disk": False} for row in saved}
    for manifest in RunFolder(run_dir).checkpoint_manifests():
        try:
            record = CheckpointRecord.read(manifest)
        except DataError:
            continue  # a checkpoint without an intact manifest does not exist
        checkpoints[record.checkpoint_id] = vars(record) | {"on_disk": record.path.is_file()}
    # A checkpoint in neither was skipped as damaged when the run was resumed.
    connection.execute("UPDATE checkpoints SET on_disk = false WHERE run_id = ?", [run_id])
    for checkpoint in checkpoints.values():
        checkpoint_id, owner_id, step, tokens_seen, sha256, size, val_loss = (checkpoint[name] for name in _CHECKPOINT)
        path = f"{run_dir.name}/{RunFolder(run_dir).checkpoint(step).name}"
        connection.execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [checkpoint_id, owner_id, step, tokens_seen, path, sha256, size, val_loss, checkpoint["on_disk"]],
        )


def _insert_document_steps(connection: duckdb.DuckDBPyConnection, run_id: str, path: Path, sha256: str) -> None:
    try:
        verify_file(path, sha256)
    except DataError as error:
        raise DataError(f"{error}; resuming the run rewrites it") from None
    _register(connection, "new_steps", path)
    connection.execute("INSERT INTO run_documents SELECT ?, document_id, first_step FROM new_steps", [run_id])


def _register(connection: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    """Makes a Parquet file readable as a table, once. DuckDB's own reader takes a path with `?`, `*` or `[` for a pattern."""
    file = pq.ParquetFile(path.absolute())  # a relative path could begin like a URL
    connection.register(name, pa.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches()))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns any error in the content of a file into a DataError that names the file."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path}: damaged, field {error} is missing") from error
    except (TypeError, ValueError, AttributeError, duckdb.Error) as error:
        raise DataError(f"{path}: not in the format that the catalog expects ({error})") from error


def _exists(connection: duckdb.DuckDBPyConnection, sql: str, identifier: str) -> bool:
    return connection.execute(sql, [identifier]).fetchone() is not None


def _json(value: Mapping[str, object], *names: str) -> list[str]:
    return [json.dumps(value[name], sort_keys=True) for name in names]


def _utc(text: str | None) -> datetime.datetime | None:
    return None if text is None else datetime.datetime.fromisoformat(text).astimezone(datetime.UTC).replace(tzinfo=None)


def _placeholders(row: list[Any]) -> str:
    return ", ".join("?" * len(row))
