"""Evaluates checkpoints, each once: the results are kept beside the checkpoint."""

from pathlib import Path
from typing import Any

from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.config import EvaluateConfig, TasksConfig
from llm_core.dataset import DatasetManifest, load_manifest
from llm_core.evaluation import evaluation_path, is_complete, read_evaluation, read_task_results, task_figures, tasks_path
from pipeline.artifacts.exports import exported
from pipeline.artifacts.step import Step
from pipeline.processes.tools import download_environment


def evaluate(step: Step, record: CheckpointRecord, manifest: DatasetManifest, config: EvaluateConfig) -> Path:
    """The file with a checkpoint's evaluation on a dataset. Evaluates if there is none; records it in the catalog.

    Raises:
        dagster.Failure: the checkpoint cannot be evaluated on this dataset; the description says why.
    """
    if config.eval_window is None:
        run_dir = record.path.parent
        config = config.resolved(RunRecord.read(run_dir).train_config(run_dir)["max_length"])
    path = evaluation_path(record, manifest, config)
    if not is_complete(path):
        options: dict[str, object] = {"checkpoint": record.path, "data_dir": step.data_dir}
        options |= {"dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id}
        step.run_tool("llm_core.evaluate_text", options | config.model_dump(exclude_defaults=True))
    step.catalog().record_evaluation(path)
    return path


def up_to_date(step: Step, path: Path) -> Path:
    """The evaluation at `path`, or a new one of its checkpoint on its text if an older version made it."""
    if is_complete(path):
        return path
    found = read_evaluation(path)
    record = CheckpointRecord.of(step.home.run(found["run_id"]).checkpoint(found["step"]))
    manifest = load_manifest(step.data_dir, found["dataset_id"], found["snapshot_id"])
    return evaluate(step, record, manifest, EvaluateConfig.model_validate(found["config"]))


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
