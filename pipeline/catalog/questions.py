"""Answers from the catalog: which runs there are, how they compare, and where their text came from."""

from pathlib import Path
from typing import Any

from llm_core.errors import UserError
from pipeline.catalog.database import Database

Row = dict[str, Any]


class Questions:
    """Questions to the catalog at a path; each opens it for reading and closes it again.

    Raises (every method):
        UserError: there is no catalog at the path.
        CatalogError: its file is damaged; a rebuild replaces it.
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
        """All training runs, the newest first, with the newest judgement of their last checkpoint."""
        return self.query(
            """
            WITH judged AS (
                SELECT checkpoint_id, max_by(value, evaluated_at) AS bits_per_byte FROM evaluations
                WHERE metric = 'bits_per_byte' AND source = 'all' GROUP BY ALL
            ),
            last AS (SELECT run_id, max_by(checkpoint_id, step) AS checkpoint_id FROM checkpoints GROUP BY ALL),
            -- A run's own count is written with its checkpoints; while it trains its metrics are ahead of it.
            reported AS (SELECT run_id, max(step) AS step, max(tokens) AS tokens FROM train_metrics GROUP BY ALL)
            SELECT r.run_id, r.status,
                   CASE WHEN r.status = 'running' THEN greatest(r.steps_done, step) ELSE r.steps_done END AS steps_done,
                   CASE WHEN r.status = 'running' THEN greatest(r.tokens_seen, tokens) ELSE r.tokens_seen END AS tokens_seen,
                   r.parameters, r.dataset_id, r.started_at, checkpoint_id, bits_per_byte
            FROM training_runs r
            LEFT JOIN reported USING (run_id) LEFT JOIN last USING (run_id) LEFT JOIN judged USING (checkpoint_id)
            ORDER BY r.started_at DESC
            """
        )

    def comparable_runs(self, evaluation_id: str) -> list[Row]:
        """Runs that were judged on the very text of an evaluation (the same dataset, read as far), the best first.

        Each with its last checkpoint that was; model_id is that of its release, if it ever was released.
        """
        return self.query(
            """
            WITH judged AS (
                SELECT evaluation_id, checkpoint_id, dataset_id, max(evaluated_at) AS evaluated_at,
                       max(value) FILTER (metric = 'bytes') AS bytes,
                       max(value) FILTER (metric = 'loss') AS loss,
                       max(value) FILTER (metric = 'bits_per_byte') AS bits_per_byte
                FROM evaluations WHERE source = 'all' GROUP BY ALL
            )
            SELECT r.run_id, r.parameters, c.checkpoint_id, c.step, c.tokens_seen, j.loss, j.bits_per_byte, m.model_id
            FROM judged j
            JOIN judged this ON this.evaluation_id = ? AND j.dataset_id = this.dataset_id AND abs(j.bytes - this.bytes) < 1
            JOIN checkpoints c ON c.checkpoint_id = j.checkpoint_id
            JOIN training_runs r USING (run_id)
            LEFT JOIN models m ON m.checkpoint_id = c.checkpoint_id
            QUALIFY row_number() OVER (PARTITION BY r.run_id ORDER BY c.step DESC, j.evaluated_at DESC) = 1
            ORDER BY j.bits_per_byte, r.run_id
            """,
            [evaluation_id],
        )

    def loss_curves(self, run_ids: list[str], points: int) -> dict[str, list[Row]]:
        """Training loss over tokens of each run: rows {tokens, loss}, the means of at most `points` stretches of its steps."""
        rows = self.query(
            """
            WITH parts AS (
                SELECT run_id, tokens, loss, ntile(?) OVER (PARTITION BY run_id ORDER BY step) AS part FROM train_metrics
                WHERE run_id IN (SELECT unnest(?)) AND loss IS NOT NULL
            )
            SELECT run_id, max(tokens) AS tokens, avg(loss) AS loss FROM parts GROUP BY run_id, part ORDER BY run_id, part
            """,
            [points, run_ids],
        )
        curves: dict[str, list[Row]] = {run_id: [] for run_id in run_ids}
        for row in rows:
            curves[row["run_id"]].append({"tokens": row["tokens"], "loss": row["loss"]})
        return curves

    def checkpoint_id(self, named: str) -> str:
        """The checkpoint of an id: its own, its run's (the last), or its model's; its beginning will do if no other has it.

        Raises:
            UserError: there is none, or there are several.
        """
        found = self.query(
            """
            SELECT checkpoint_id FROM checkpoints WHERE starts_with(checkpoint_id, $1)
            UNION SELECT max_by(checkpoint_id, step) FROM checkpoints WHERE starts_with(run_id, $1) GROUP BY run_id
            UNION SELECT checkpoint_id FROM models WHERE starts_with(model_id, $1)
            """,
            [named],
        )
        if not found and self.query("SELECT 1 FROM training_runs WHERE starts_with(run_id, ?)", [named]):
            raise UserError(f"{named}: this run has no checkpoint yet")
        if len(found) != 1:
            which = f"{len(found)} checkpoints are meant by it" if found else "no checkpoint, run or model in the catalog"
            raise UserError(f"{named}: {which}; `textmill runs` lists them")
        return str(found[0]["checkpoint_id"])

    def lineage(self, checkpoint_id: str) -> list[Row]:
        """Everything a checkpoint was made from: its own run (generation 0) and those whose weights it began with (1, 2, ...).

        For each run a row for each place in a raw file whose text it has seen; one row without a document where it has seen none.
        Of a checkpoint that the catalog does not know there are none.
        """
        return self.query(
            "SELECT * FROM checkpoint_lineage WHERE checkpoint_id = ? ORDER BY generation, path, start_byte", [checkpoint_id]
        )

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
            SELECT checkpoint_id, run_id, step, on_disk, count(DISTINCT document_id) AS documents,
                   min_by(seen_by_run_id, first_step) AS seen_by_run_id, min(first_step) AS first_step
            FROM document_usage WHERE document_id IN ({known})
            GROUP BY ALL ORDER BY run_id, step
            """,
            [document_or_path, document_or_path],
        )
