"""lm-eval tasks in the lineage: they run once; results are on the asset page, in the catalog and in a rebuilt catalog."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.evaluation import evaluation
from pipeline.catalog.rebuild import rebuild
from tests.llm_core.evaluation.test_tasks import EXAMPLES, TASK
from tests.pipeline.conftest import Home


@pytest.mark.slow
def test_lm_eval_tasks_run_once_and_their_results_are_reused(trained_home: tuple[Home, Any], clone: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    (tmp_path / "endings.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    home, _ = clone(trained_home)
    other = {"checkpoint": {"learning_rate": 1e-6}}  # this model is not released: it is exported only for the tasks
    options = {"evaluation": {"lm_eval_tasks": ["endings"], "lm_eval_task_dir": str(tmp_path), "lm_eval_limit": 5}}
    result = home.materialize(checkpoint, evaluation, **other, **options)
    (record,) = home.metadata(result, "evaluation")["lm_eval"].records
    assert (record.data["task"], record.data["metric"], record.data["examples"]) == ("endings", "acc", 5)
    query = "SELECT metric, split, value, checkpoint_id FROM evaluations WHERE source = 'endings' ORDER BY metric"
    rows = home.catalog.query(query)
    assert [(row["metric"], row["split"]) for row in rows] == [("acc", "test"), ("acc_stderr", "test"), ("examples", "test")]
    assert rows[0]["value"] == record.data["value"]
    assert {row["checkpoint_id"] for row in rows} == {home.metadata(result, "checkpoint")["checkpoint_id"]}
    assert not list(home.folders.checkpoints.glob("*/.*exported")), "the export for the tasks was removed"

    def evaluations() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in home.folders.checkpoints.glob("*/evaluation_step_*.json")}

    before = evaluations()
    home.materialize(checkpoint, evaluation, **other, **options)
    assert evaluations() == before, "no task runs twice"
    with (tmp_path / "endings.jsonl").open("a") as file:
        file.write(json.dumps(EXAMPLES[0]) + "\n")
    home.materialize(checkpoint, evaluation, **other, **options)
    assert len(evaluations()) == len(before) + 1, "a changed task is evaluated again"
    assert rebuild(home.folders.root, home.folders.catalog) == []
    assert len(home.catalog.query(query)) == 2 * len(rows)
