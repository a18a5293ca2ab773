"""Tries checkpoints on tasks of lm-eval, each once: what was found is kept beside the checkpoint."""

from typing import Any

import dagster as dg

from llm_core.checkpoint_files import CheckpointRecord
from llm_core.config import HarnessConfig
from llm_core.evaluation_file import harness_path, read_evaluation, task_figures
from pipeline.launcher import download_environment, run_tool
from pipeline.release import exported
from pipeline.resources import CatalogResource, Storage


def try_tasks(
    context: dg.AssetExecutionContext,
    storage: Storage,
    catalog: CatalogResource,
    record: CheckpointRecord,
    config: HarnessConfig,
) -> list[dict[str, Any]]:
    """A row for each figure of the tasks, found now or before, and recorded in the catalog; none where no task is named.

    Raises:
        dagster.Failure: a task cannot be tried; the description says why.
    """
    if not config.lm_eval_tasks:
        return []
    path = harness_path(record, config)
    if not path.exists():
        with exported(context, storage, record) as directory:
            options = {"model_dir": directory, "output_file": path} | config.model_dump(exclude_defaults=True)
            run_tool(context, "llm_core.harness", options, download_environment())
    catalog.open(storage).record_evaluation(path)
    return task_figures(read_evaluation(path))
