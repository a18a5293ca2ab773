"""Judges checkpoints on held-out text, each once: what was found is kept beside the checkpoint."""

from pathlib import Path

import dagster as dg

from llm_core.checkpoint_files import CheckpointRecord
from llm_core.config import EvaluateConfig
from llm_core.evaluation_file import evaluation_path
from llm_core.shards import DatasetManifest
from pipeline.launcher import run_tool
from pipeline.resources import CatalogResource, Storage


def judge(
    context: dg.AssetExecutionContext,
    storage: Storage,
    catalog: CatalogResource,
    record: CheckpointRecord,
    manifest: DatasetManifest,
    config: EvaluateConfig,
) -> Path:
    """The file with the judgement of a checkpoint on a dataset; made if there is none yet, and recorded in the catalog.

    Raises:
        dagster.Failure: the checkpoint cannot be judged on this dataset; the description says why.
    """
    path = evaluation_path(record, manifest, config)
    if not path.exists():
        options: dict[str, object] = {"checkpoint": record.path, "data_dir": storage.processed}
        options |= {"dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id}
        run_tool(context, "llm_core.judge", options | config.model_dump(exclude_defaults=True))
    catalog.open(storage).record_evaluation(path)
    return path
