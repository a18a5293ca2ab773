"""When a checkpoint becomes the released model of its line."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from llm_core.artifact_ids import evaluation_id
from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.config import EvaluateConfig, ReleaseConfig
from llm_core.corpus import load_scan
from llm_core.dataset import DatasetManifest, load_manifest
from llm_core.errors import DataError
from llm_core.evaluation import Difference, Evaluation, compare, is_complete, metric, read_documents, read_evaluation
from llm_core.huggingface import ModelRecord
from llm_core.system import held, read_json, verify_file, write_json
from llm_core.tokenizer import Tokenizer
from pipeline.artifacts.evaluations import evaluate
from pipeline.artifacts.exports import release
from pipeline.artifacts.pointers import find_current, released_directories
from pipeline.artifacts.step import Step
from pipeline.resources import Storage


@dataclass(frozen=True)
class Comparison:
    """A checkpoint beside the released model of its line, both on the same held-out text."""

    model: ModelRecord | None = None  # the released one; None before the first release
    released: Evaluation | None = None  # None if there is nothing to compare with
    difference: Difference | None = None  # by how much the checkpoint is better
    missing: str = ""  # why there is nothing to compare with


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is released, and why."""

    promoted: bool
    reason: str


def release_if_better(step: Step, record: CheckpointRecord, evaluation: Path, config: ReleaseConfig) -> Verdict:
    """Compares a checkpoint with the released model on the same text and releases it if it is better.

    evaluation: the file with its evaluation.
    """
    with _one_at_a_time(step):
        comparison = compare_with_released(step, evaluation)
        model = comparison.model
        newer = model is not None and _has_newer_text(step, record, model)
        verdict = decide(comparison, read_evaluation(evaluation), newer, config)
        if verdict.promoted:
            # A released model that is exported again keeps its reason.
            reason = model.reason if model is not None and model.checkpoint_id == record.checkpoint_id else verdict.reason
            step.catalog().record_model(release(step, record, evaluation, reason))
    if not verdict.promoted:
        step.log.warning(f"not released: {verdict.reason}")
    return verdict


def decide(comparison: Comparison, evaluation: Evaluation, newer_text: bool, config: ReleaseConfig) -> Verdict:
    """Whether the checkpoint of an evaluation is released.

    newer_text: whether it was trained on newer text than the released model.
    """
    value, model = metric(evaluation, "bits_per_byte"), comparison.model
    if not math.isfinite(value):
        return Verdict(False, f"{value} bits per byte: the evaluation is not finite, the released model stays")
    if model is None:
        return Verdict(True, f"first release: {value:.4f} bits per byte")
    if model.checkpoint_id == evaluation["checkpoint_id"]:
        return Verdict(True, "this checkpoint is the released model already")
    if comparison.released is None or comparison.difference is None:
        return Verdict(True, f"{value:.4f} bits per byte; nothing to compare with: {comparison.missing}")
    bar, difference = metric(comparison.released, "bits_per_byte"), comparison.difference
    reason = f"{value:.4f} bits per byte; the released model {model.model_id} has {bar:.4f} on the same held-out text"
    if not math.isfinite(bar):
        return Verdict(True, reason)
    reason += f"; improvement {difference}"
    # A negative minimum allows a model that is worse, but certainly not by more.
    minimum, certain = config.min_improvement, min(config.min_improvement, 0.0)
    if difference.low > certain:
        if difference.improvement > minimum:
            return Verdict(True, reason)
        return Verdict(False, f"{reason}: not better by more than {minimum}, the old release stays")
    if difference.high < certain:
        return Verdict(False, f"{reason}: worse, the old release stays")
    # Without an interval, a model that looks worse stays out.
    if newer_text and minimum <= 0 and (math.isfinite(difference.low) or difference.improvement >= minimum):
        return Verdict(True, f"{reason}: a tie, which goes to the model trained on newer text")
    return Verdict(False, f"{reason}: a tie, the old release stays")


def compare_with_released(step: Step, evaluation: Path) -> Comparison:
    """The released model beside the checkpoint of an evaluation, on its text. Evaluates it there unless that is done already."""
    found, model = read_evaluation(evaluation), released_model(step.storage)
    if model is None or model.checkpoint_id == found["checkpoint_id"]:
        return Comparison(model)
    if (run_dir := step.home.run(model.run_id).root).is_dir():
        step.storage.use(run_dir)
    manifest = load_manifest(step.data_dir, found["dataset_id"], found["snapshot_id"])
    config = EvaluateConfig.model_validate(found["config"])
    path = step.home.run(model.run_id).evaluation(model.step, evaluation_id(model.checkpoint_id, manifest, config))
    if not is_complete(path):
        released, missing = _evaluable(step, model, manifest)
        if released is None:
            step.log.warning(f"nothing to compare with: {missing}")
            return Comparison(model, missing=missing)
        evaluate(step, released, manifest, config)
    return Comparison(model, read_evaluation(path), compare(read_documents(evaluation), read_documents(path)))


def _evaluable(step: Step, model: ModelRecord, manifest: DatasetManifest) -> tuple[CheckpointRecord | None, str]:
    """The checkpoint of the released model; or None, and why it cannot be evaluated on a dataset."""
    name = f"the released model {model.model_id}"
    record = released_checkpoint(step.storage)
    if record is None or not record.path.is_file():
        return None, f"the checkpoint of {name}, {model.checkpoint_file} of run {model.run_id}, is gone"
    try:
        verify_file(record.path, record.sha256)
    except DataError as error:
        return None, f"the checkpoint of {name} cannot be read: {error}"
    if not _can_read(step.data_dir, model.tokenizer_id, manifest):
        return (
            None,
            f"{name} cannot read this text: its tokenizer {model.tokenizer_id} is gone, or only one of the two is byte-level",
        )
    return record, ""


def _has_newer_text(step: Step, record: CheckpointRecord, model: ModelRecord) -> bool:
    """Whether a checkpoint was trained on other text than the released model, and later."""
    run, other = RunRecord.read(record.path.parent), RunRecord.find(step.home.run(model.run_id).root)
    snapshot_id = (other.snapshot_id if other is not None else None) or model.snapshot_id
    if run.dataset_id == model.dataset_id or run.snapshot_id == snapshot_id:
        return False
    return other is None or datetime.fromisoformat(run.started_at) > datetime.fromisoformat(other.started_at)


def _can_read(data_dir: Path, tokenizer_id: str, manifest: DatasetManifest) -> bool:
    """Whether a model with this tokenizer can be evaluated on a dataset: only byte-level tokens give the text back."""
    if tokenizer_id == manifest.tokenizer.tokenizer_id:
        return True
    try:
        own = Tokenizer.stored(data_dir, tokenizer_id)
    except DataError:
        return False
    return own.can_read(manifest.tokenizer.tokenizer_id, manifest.tokenizer.tokenizer_type)


def released_model(storage: Storage) -> ModelRecord | None:
    """The released model of the line; None before the first release, or if its directory was deleted."""
    directory = find_current(storage.released)
    return ModelRecord.read(directory) if directory is not None and directory.exists() else None


def released_checkpoint(storage: Storage, tokenizer_id: str | None = None) -> CheckpointRecord | None:
    """The checkpoint of the released model; None if it was deleted or has another tokenizer."""
    model = released_model(storage)
    if model is None or tokenizer_id not in (None, model.tokenizer_id):
        return None
    try:
        return CheckpointRecord.of(storage.folders.run(model.run_id).checkpoint(model.step))
    except DataError:
        return None


def released_lines(storage: Storage) -> dict[str, list[str]]:
    """The release lines in which each checkpoint is the released one now; the line without a name is "default"."""
    lines: dict[str, list[str]] = {}
    for line, directory in released_directories(storage.folders):
        if directory.exists():
            lines.setdefault(ModelRecord.read(directory).checkpoint_id, []).append(line)
    return lines


@contextmanager
def _one_at_a_time(step: Step) -> Iterator[None]:
    """Waits for other processes that release: each model is compared with what the previous one released."""
    models = step.home.models
    with held(models, lambda pid: step.log.info(f"{models}: process {pid} is releasing; waiting for it")):
        yield


def remember_decision(storage: Storage, snapshot_id: str) -> None:
    """Records that a model of this text was released or was not better: the text needs no further training."""
    if _decided_on(storage) != snapshot_id:
        write_json(storage.decision, {"snapshot_id": snapshot_id})


def is_decided(storage: Storage) -> bool:
    """Whether the newest decision of this release line is about the newest snapshot of the raw text.

    A training that failed in any step comes to no decision.
    """
    snapshot_id, _ = load_scan(storage.folders.prepared.root)
    return snapshot_id is not None and snapshot_id == _decided_on(storage)


def _decided_on(storage: Storage) -> str | None:
    """The snapshot of the newest decision; None if there is none or its file is damaged."""
    try:
        return read_json(storage.decision).get("snapshot_id")
    except DataError:
        return None
