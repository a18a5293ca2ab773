"""Ids of trained artifacts: hashes of everything that determines them, computed without loading any of it."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llm_core.config import EvaluateConfig, HarnessConfig, TrainConfig
from llm_core.files import content_id, sha256_file
from llm_core.shards import DatasetManifest

# Each is raised when the same inputs begin to give another result.
TRAINING_VERSION = 1
EVALUATION_VERSION = 3
HARNESS_VERSION = 1
EXPORT_VERSION = 1


def run_id(manifest: DatasetManifest, config: TrainConfig, parent_checkpoint_id: str | None = None) -> str:
    """The training run that a resolved configuration makes of a dataset, from the start or from a parent's weights."""
    # Which source a document belongs to is no fact of the dataset: the same documents can move to another folder.
    sources = manifest.snapshot_id if config.source_weights else None
    ids = (manifest.dataset_id, manifest.tokenizer.tokenizer_id, parent_checkpoint_id, sources)
    return content_id("run", TRAINING_VERSION, *ids, config.identity())


def evaluation_id(checkpoint_id: str, manifest: DatasetManifest, config: EvaluateConfig) -> str:
    """The judgement of a checkpoint on the held-out text of a dataset; its snapshot tells the sources of the documents."""
    ids = (checkpoint_id, manifest.dataset_id, manifest.snapshot_id)
    return content_id("evaluation", EVALUATION_VERSION, *ids, config.identity())


def harness_id(checkpoint_id: str, config: HarnessConfig) -> str:
    """The judgement of a checkpoint by the installed harness; tasks of one's own count with every file of their folder."""
    try:
        harness = version("lm_eval")
    except PackageNotFoundError:
        harness = "not installed"
    own: list[tuple[str, str]] = []
    if config.lm_eval_task_dir is not None:
        folder = Path(config.lm_eval_task_dir)
        own = [(str(path.relative_to(folder)), sha256_file(path)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return content_id("harness", HARNESS_VERSION, checkpoint_id, harness, own, config.identity())


def model_id(checkpoint_id: str) -> str:
    """The exported form of a checkpoint."""
    return content_id("model", EXPORT_VERSION, checkpoint_id)
