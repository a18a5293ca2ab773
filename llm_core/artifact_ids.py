"""Ids of runs, evaluations and models: hashes of everything that determines them, computed without loading any of it.

Ids of snapshots, tokenizers, shards and datasets are computed where these are made.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llm_core.config import EvaluateConfig, ResolvedTrainConfig, TasksConfig
from llm_core.dataset import DatasetManifest
from llm_core.system import content_id, sha256_file

# Increased when the same inputs start to give a different result.
TRAINING_VERSION = 1
EVALUATION_VERSION = 4
TASKS_VERSION = 2
EXPORT_VERSION = 2


def run_id(manifest: DatasetManifest, config: ResolvedTrainConfig, parent_checkpoint_id: str | None = None) -> str:
    """The training run of a resolved configuration on a dataset, from scratch or from a parent's weights."""
    # The sources of documents are not part of the dataset: the same documents can move to another folder.
    sources = manifest.snapshot_id if config.source_weights else None
    ids = (manifest.dataset_id, manifest.tokenizer.tokenizer_id, parent_checkpoint_id, sources)
    return content_id("run", TRAINING_VERSION, *ids, config.identity())


def evaluation_id(checkpoint_id: str, manifest: DatasetManifest, config: EvaluateConfig) -> str:
    """The evaluation of a checkpoint on the held-out text of a dataset, whose snapshot has the sources of the documents.

    config: resolved.
    """
    assert config.eval_window is not None, "the windows are part of the text"
    ids = (checkpoint_id, manifest.dataset_id, manifest.snapshot_id)
    return content_id("evaluation", EVALUATION_VERSION, *ids, config.identity())


def tasks_id(checkpoint_id: str, config: TasksConfig) -> str:
    """The results of a checkpoint on tasks of the installed lm-eval; custom tasks count with every file in their folder."""
    try:
        lm_eval = version("lm_eval")
    except PackageNotFoundError:
        lm_eval = "not installed"
    own: list[tuple[str, str]] = []
    if config.lm_eval_task_dir is not None:
        folder = Path(config.lm_eval_task_dir)
        own = [(str(path.relative_to(folder)), sha256_file(path)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return content_id("harness", TASKS_VERSION, checkpoint_id, lm_eval, own, config.identity())


def model_id(checkpoint_id: str) -> str:
    """The exported form of a checkpoint."""
    return content_id("model", EXPORT_VERSION, checkpoint_id)
