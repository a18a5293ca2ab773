"""Queries for training runs, their comparison, and the text they were trained on."""

from pathlib import Path
from typing import Any

from llm_core.errors import UserError
from pipeline.catalog.database import Database

Row = dict[str, Any]


class CatalogQueries:
    """The queries of a catalog. Each opens the file for reading and closes it again.

    Raises (every method):
        UserError: there is no catalog at the path.
        CatalogError: the file is damaged; a rebuild replaces it.
    """

    def __init__(self, path: Path, wait_seconds: float = 60.0) -> None:
        self._database = Database(path, wait_seconds)

    def query(self, sql: str, parameters: list[Any] | None = None) -> list[Row]:
        """Rows of a read-only query, each a dict by column name."""
        with self._database.connect(read_only=True) as connection:
            cursor = connection.execute(sql, parameters or [])
            names = [column[0] for column in cursor.description or []]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def runs(self) -> list[Row]:
        """All training runs, the newest first, with the newest evaluation of their last checkpoint and its dataset."""
        return self.query(
            """
            WITH evaluated AS (
                SELECT checkpoint_id, max_by(value, evaluated_at) AS bits_per_byte,
                       max_by(dataset_id, evaluated_at) AS evaluated_on
                FROM evaluations WHERE metric = 'bits_per_byte' AND source = 'all' GROUP BY ALL
            ),
            last AS (SELECT run_id, max_by(checkpoint_id, step) AS checkpoint_id FROM checkpoints GROUP BY ALL),
            exported AS (SELECT run_id, list(model_id ORDER BY model_id) AS model_ids FROM models GROUP BY ALL),
            -- run.json is written with each checkpoint: during training the metrics are ahead of it.
            reported AS (SELECT run_id, max(step) AS step, max(tokens) AS tokens FROM train_metrics GROUP BY ALL)
            SELECT r.run_id, r.status,
                   CASE WHEN r.status = 'running' THEN greatest(r.steps_done, step) ELSE r.steps_done END AS steps_done,
                   CASE WHEN r.status = 'running' THEN greatest(r.tokens_seen, tokens) ELSE r.tokens_seen END AS tokens_seen,
                   r.parameters, r.dataset_id, r.started_at, checkpoint_id, bits_per_byte, evaluated_on, model_ids, r.removed_at
            FROM training_runs r
            LEFT JOIN reported USING (run_id) LEFT JOIN last USING (run_id) LEFT JOIN evaluated USING (checkpoint_id)
            LEFT JOIN exported USING (run_id)
            ORDER BY r.started_at DESC
            """
        )

    def not_removed(self) -> set[str]:
        """Ids of the runs and models that the catalog does not list as removed."""
        rows = self.query(
            "SELECT run_id AS id FROM training_runs WHERE removed_at IS NULL "
            "UNION ALL SELECT model_id FROM models WHERE removed_at IS NULL"
        )
        return {row["id"] for row in rows}

    def comparable_runs(self, evaluation_id: str) -> list[Row]:
        """The runs evaluated on the same text as an evaluation, the best first.

        A row has the last evaluated checkpoint of its run; model_id is set if that checkpoint was ever released.
        """
        return self.query(
            """
            WITH evaluated AS (
                SELECT evaluation_id, checkpoint_id, dataset_id, text_id, max(evaluated_at) AS evaluated_at,
                       max(value) FILTER (metric = 'bytes') AS bytes,
                       max(value) FILTER (metric = 'loss') AS loss,
                       max(value) FILTER (metric = 'bits_per_byte') AS bits_per_byte
                FROM evaluations WHERE source = 'all' GROUP BY ALL
            )
            SELECT r.run_id, r.parameters, c.checkpoint_id, c.step, c.tokens_seen, j.loss, j.bits_per_byte, m.model_id
            FROM evaluated j
            -- Older evaluations have no text_id; they read the beginning of the text, as many tokens as was asked for.
            JOIN evaluated this ON this.evaluation_id = ? AND j.dataset_id = this.dataset_id
                AND j.text_id IS NOT DISTINCT FROM this.text_id AND abs(j.bytes - this.bytes) < 1
            JOIN checkpoints c ON c.checkpoint_id = j.checkpoint_id
            JOIN training_runs r USING (run_id)
            LEFT JOIN models m ON m.checkpoint_id = c.checkpoint_id
            QUALIFY row_number() OVER (PARTITION BY r.run_id ORDER BY c.step DESC, j.evaluated_at DESC) = 1
            ORDER BY j.bits_per_byte, r.run_id
            """,
            [evaluation_id],
        )

    def loss_curves(self, run_ids: list[str], points: int) -> dict[str, list[Row]]:
        """Training loss over tokens of each run: rows {tokens, loss}, averaged to at most `points` points."""
        rows = self.query(
            """
            WITH buckets AS (
                SELECT run_id, tokens, loss, ntile(?) OVER (PARTITION BY run_id ORDER BY step) AS bucket FROM train_metrics
                WHERE run_id IN (SELECT unnest(?)) AND loss IS NOT NULL
            )
            SELECT run_id, max(tokens) AS tokens, avg(loss) AS loss FROM buckets GROUP BY run_id, bucket ORDER BY run_id, bucket
            """,
            [points, run_ids],
        )
        curves: dict[str, list[Row]] = {run_id: [] for run_id in run_ids}
        for row in rows:
            curves[row["run_id"]].append({"tokens": row["tokens"], "loss": row["loss"]})
        return curves

    def checkpoint_id(self, prefix: str) -> str:
        """The id of a checkpoint, given the id, or a unique prefix, of a checkpoint, a run (its last checkpoint) or a model.

        Raises:
            UserError: none or several match.
        """
        matches = self.query(
            """
            SELECT checkpoint_id FROM checkpoints WHERE starts_with(checkpoint_id, $1)
            UNION SELECT max_by(checkpoint_id, step) FROM checkpoints WHERE starts_with(run_id, $1) GROUP BY run_id
            UNION SELECT checkpoint_id FROM models WHERE starts_with(model_id, $1)
            """,
            [prefix],
        )
        if not matches and self.query("SELECT 1 FROM training_runs WHERE starts_with(run_id, ?)", [prefix]):
            raise UserError(f"{prefix}: this run has no checkpoint yet")
        if len(matches) != 1:
            problem = f"matches {len(matches)} checkpoints" if matches else "no checkpoint, run or model in the catalog"
            raise UserError(f"{prefix}: {problem}; `textmill runs` lists them")
        return str(matches[0]["checkpoint_id"])

    def lineage(self, checkpoint_id: str) -> list[Row]:
        """Everything a checkpoint was made from: its own run (generation 0) and the runs it started from (1, 2, ...).

        One row for each run and each place in a raw file that it was trained on; one row without a document for a run that was
        not trained on any text. No rows for an unknown checkpoint.
        """
        return self.query(
            "SELECT * FROM checkpoint_lineage WHERE checkpoint_id = ? ORDER BY generation, path, start_byte", [checkpoint_id]
        )

    def usage(self, document_or_path: str) -> list[Row]:
        """The checkpoints trained on a document, given by its id, or on any document of a raw file, given by its path.

        Raises:
            UserError: the catalog has no such document or file.
        """
        known = "SELECT DISTINCT document_id FROM snapshot_documents WHERE document_id = ? OR path = ?"
        if not self.query(known, [document_or_path, document_or_path]):
            raise UserError(
                f"{document_or_path}: neither a document id nor the path of a raw file (relative to the raw text folder)"
            )
        return self.query(
            f"""
            SELECT checkpoint_id, run_id, step, on_disk, count(DISTINCT document_id) AS documents,
                   min_by(seen_by_run_id, first_step) AS seen_by_run_id, min(first_step) AS first_step,
                   any_value(removed_at) AS removed_at
            FROM document_usage WHERE document_id IN ({known})
            GROUP BY ALL ORDER BY run_id, step
            """,
            [document_or_path, document_or_path],
        )
