"""Evaluates checkpoints, each once: the results are kept beside the checkpoint."""

from pathlib import Path
from typing import Any

from llm_core.checkpoint import CheckpointRecord
from llm_core.config import EvaluateConfig, TasksConfig
from llm_core.dataset import DatasetManifest
from llm_core.evaluation import evaluation_path, read_task_results, task_figures, tasks_path
from pipeline.artifacts.exports import exported
from pipeline.artifacts.step import Step
from pipeline.processes.tools import download_environment


def evaluate(step: Step, record: CheckpointRecord, manifest: DatasetManifest, config: EvaluateConfig) -> Path:
    """The file with a checkpoint's evaluation on a dataset. Evaluates if there is none; records it in the catalog.

    Raises:
        dagster.Failure: the checkpoint cannot be evaluated on this dataset; the description says why.
    """
    path = evaluation_path(record, manifest, config)
    if not path.exists():
        options: dict[str, object] = {"checkpoint": record.path, "data_dir": step.data_dir}
        options |= {"dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id}
        step.run_tool("llm_core.evaluate_text", options | config.model_dump(exclude_defaults=True))
    step.catalog().record_evaluation(path)
    return path


def evaluate_on_tasks(step: Step, record: CheckpointRecord, config: TasksConfig) -> list[dict[str, Any]]:
    """A row for each metric of the configured lm-eval tasks. Runs them if there are no results; records them in the catalog.

    Raises:
        dagster.Failure: a task cannot be run; the description says why.
    """
    if not config.lm_eval_tasks:
        return []
    path = tasks_path(record, config)
    if not path.exists():
        with exported(step, record) as directory:
            options = {"model_dir": directory, "output_file": path} | config.model_dump(exclude_defaults=True)
            step.run_tool("llm_core.evaluate_tasks", options, download_environment())
    step.catalog().record_evaluation(path)
    return task_figures(read_task_results(path))
