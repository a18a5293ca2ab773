"""The whole lineage, the tools and the command in a folder with the worst name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llm_core.evaluation import read_evaluation, read_task_results
from tests.pipeline.conftest import Home
from tests.support.dagster_dev import ROOT
from tests.support.names import WORST_NAME

PROMPTS = ["Wetter in München", "a\nb", 'it\'s "q"', "--- a/file", "null", "a, b"]
# `data_files` is a pattern of the library datasets, so that the data is elsewhere.
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_two_ranks_tools_catalog_and_tasks_work_in_a_folder_with_the_worst_name(
    make_home: Callable[[], Home], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / WORST_NAME
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    (tmp_path / "data.jsonl").write_text(json.dumps({"start": "The", "ends": [" end", " name"]}) + "\n")
    (tasks / "own.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    make_home().folders.raw_text.rename(folder / "raw_text_data")
    home = Home(folder, dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))))

    tasks_options = {"lm_eval_tasks": ["own"], "lm_eval_task_dir": str(tasks)}
    home.materialize(checkpoint={"nproc_per_node": 2}, evaluation={"sample_prompts": PROMPTS} | tasks_options)

    (run,) = home.folders.runs()
    assert json.loads(run.record.read_text())["world_size"] == 2
    results = home.folders.evaluations()
    (evaluation,) = [path for path in results if "samples" in json.loads(path.read_text())]
    assert [sample["prompt"] for sample in read_evaluation(evaluation)["samples"]] == PROMPTS
    (figures,) = [read_task_results(path)["figures"] for path in results if path != evaluation]
    assert {figure["task"] for figure in figures} == {"own"}
    (model,) = home.folders.model_folders()
    assert model.weights.is_file()

    def tool(module: str, *arguments: str, **environment: str) -> str:
        command = [sys.executable, "-m", module, *arguments]
        settings: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)} | environment}
        done = subprocess.run(command, capture_output=True, text=True, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Relative, so that each path begins with "-".
    data = f"{WORST_NAME}/processed_data"
    checkpoint = str(run.checkpoint(6).relative_to(tmp_path))
    generate = ["--checkpoint", checkpoint, "--data_dir", data, "--max_new_tokens", "1"]
    assert tool("llm_core.generate", *generate, "--prompt", "--- a/file").startswith("--- a/file")
    folders = ["--input_dir", f"{WORST_NAME}/raw_text_data", "--output_dir", f"{WORST_NAME}/again"]
    assert "Dataset" in tool("llm_core.data_prep_tool", *folders, "--vocab_size", "400")
    assert run.root.name in tool("pipeline.cli", "runs", TEXTMILL_HOME=WORST_NAME)
    assert "topic" in tool("pipeline.cli", f"--home={WORST_NAME}", "lineage", run.root.name)
