"""When a checkpoint becomes the released model, and what is written then."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster import AssetExecutionContext

from llm_core.checkpoint_files import CheckpointRecord, manifest_path
from llm_core.config import EvaluateConfig, ReleaseConfig
from llm_core.errors import DataError
from llm_core.evaluation_file import Evaluation, evaluation_path, metric, read_evaluation
from llm_core.files import read_json, verify_file
from llm_core.identity import model_id
from pipeline.current import find_current, set_current
from pipeline.launcher import run_tool
from pipeline.resources import Storage


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is released, and why."""

    promoted: bool
    reason: str


def released_model(storage: Storage) -> dict[str, Any] | None:
    """textmill.json of the released model, None before the first release."""
    directory = find_current(storage.released)
    return None if directory is None else read_json(directory / "textmill.json")


def released_checkpoint(storage: Storage, tokenizer_id: str) -> CheckpointRecord | None:
    """The checkpoint behind the released model; None before the first release, after its deletion, or with another tokenizer."""
    model = released_model(storage)
    if model is None or model["tokenizer_id"] != tokenizer_id:
        return None
    try:
        return CheckpointRecord.read(manifest_path(storage.checkpoints / model["run_id"] / model["checkpoint_file"]))
    except DataError:
        return None


def decide(storage: Storage, run: dict[str, Any], evaluation: Evaluation, config: ReleaseConfig) -> Verdict:
    """Compares an evaluated checkpoint with the released model, on the same held-out text where both can read it."""
    found = metric(evaluation, "bits_per_byte")
    model, record = released_model(storage), released_checkpoint(storage, run["tokenizer_id"])
    if model is None:
        return Verdict(True, f"first release: {found:.4f} bits per byte")
    if model["checkpoint_id"] == evaluation["checkpoint_id"]:
        return Verdict(True, "this checkpoint is the released model already")
    before, basis = model["metrics"]["bits_per_byte"], "as recorded at its release"
    if record is not None:
        path = evaluation_path(record, evaluation["dataset_id"], EvaluateConfig.model_validate(evaluation["config"]))
        if path.exists():
            before, basis = metric(read_evaluation(path), "bits_per_byte"), "on the same held-out text"
    comparison = f"{found:.4f} bits per byte; the released model {model['model_id']} has {before:.4f} {basis}"
    if found < before - config.min_improvement:
        return Verdict(True, comparison)
    return Verdict(False, f"{comparison}: not better by more than {config.min_improvement}, the old release stays")


def release(context: AssetExecutionContext, storage: Storage, record: CheckpointRecord, evaluation: Path, reason: str) -> Path:
    """Exports a checkpoint and makes it the released model; a directory that is there already and whole is only pointed at."""
    directory = storage.models / model_id(record.checkpoint_id)
    if not _is_whole(directory):
        options = {"checkpoint": record.path, "data_dir": storage.processed, "output_dir": directory}
        run_tool(context, "llm_core.export", options | {"evaluation": evaluation, "reason": reason})
    set_current(storage.released, directory)
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether every file of an exported model is as its textmill.json says."""
    try:
        for name, sha256 in read_json(directory / "textmill.json")["files"].items():
            verify_file(directory / name, sha256)
    except DataError:
        return False
    return True
