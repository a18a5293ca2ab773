"""Tasks of lm-eval in the lineage: tried once, on the asset page, in the catalog and in a rebuilt one."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.evaluation import evaluation
from pipeline.catalog.rebuild import rebuild
from tests.llm_core.test_harness import EXAMPLES, TASK
from tests.pipeline.conftest import Home


@pytest.mark.slow
def test_the_evaluation_tries_the_tasks_once_and_remembers_the_figures(
    trained_home: tuple[Home, Any], clone: Any, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    (tmp_path / "endings.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "endings.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    home, _ = clone(trained_home)
    other = {"checkpoint": {"learning_rate": 1e-6}}  # a model that is not released: exported for the tasks alone
    options = {"evaluation": {"lm_eval_tasks": ["endings"], "lm_eval_task_dir": str(tmp_path), "lm_eval_limit": 5}}
    found = home.materialize(checkpoint, evaluation, **other, **options)
    (record,) = home.metadata(found, "evaluation")["lm_eval"].records
    assert (record.data["task"], record.data["metric"], record.data["examples"]) == ("endings", "acc", 5)
    asked = "SELECT metric, split, value, checkpoint_id FROM evaluations WHERE source = 'endings' ORDER BY metric"
    rows = home.catalog.query(asked)
    assert [(row["metric"], row["split"]) for row in rows] == [("acc", "test"), ("acc_stderr", "test"), ("examples", "test")]
    assert rows[0]["value"] == record.data["value"]
    assert {row["checkpoint_id"] for row in rows} == {home.metadata(found, "checkpoint")["checkpoint_id"]}
    assert not list(home.storage.checkpoints.glob("*/.*exported")), "the export for the tasks is gone"

    def judged() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in home.storage.checkpoints.glob("*/evaluation_step_*.json")}

    before = judged()
    home.materialize(checkpoint, evaluation, **other, **options)
    assert judged() == before, "nothing is tried again"
    with (tmp_path / "endings.jsonl").open("a") as file:
        file.write(json.dumps(EXAMPLES[0]) + "\n")
    home.materialize(checkpoint, evaluation, **other, **options)
    assert len(judged()) == len(before) + 1, "another task is another judgement"
    assert rebuild(home.storage.root, home.storage.root / "catalog.duckdb") == []
    assert len(home.catalog.query(asked)) == 2 * len(rows)
