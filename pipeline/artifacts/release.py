"""When a checkpoint becomes the released model of its line."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm_core.checkpoint import CheckpointRecord
from llm_core.config import EvaluateConfig, ReleaseConfig
from llm_core.corpus import load_scan
from llm_core.dataset import DatasetManifest, load_manifest
from llm_core.errors import DataError
from llm_core.evaluation import Evaluation, metric, read_evaluation
from llm_core.huggingface import ModelRecord
from llm_core.system import held, read_json, write_json
from llm_core.tokenizer import Tokenizer
from pipeline.artifacts.evaluations import evaluate
from pipeline.artifacts.exports import release
from pipeline.artifacts.pointers import find_current
from pipeline.artifacts.step import Step
from pipeline.resources import Storage


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is released, and why."""

    promoted: bool
    reason: str


def release_if_better(step: Step, record: CheckpointRecord, evaluation: Path, config: ReleaseConfig) -> Verdict:
    """Compares a checkpoint with the released model on the same text and releases it if it is better.

    evaluation: the file with its evaluation.
    """
    results = read_evaluation(evaluation)
    with _one_at_a_time(step):
        verdict = decide(released_model(step.storage), results, evaluate_released(step, results), config)
        if verdict.promoted:
            step.catalog().record_model(release(step, record, evaluation, verdict.reason))
    if not verdict.promoted:
        step.log.warning(f"not released: {verdict.reason}")
    return verdict


def decide(model: ModelRecord | None, evaluation: Evaluation, released: Evaluation | None, config: ReleaseConfig) -> Verdict:
    """Compares an evaluated checkpoint with the released model.

    model: the released one. released: its evaluation on the same text; None if it cannot be evaluated on it.
    """
    value = metric(evaluation, "bits_per_byte")
    if not math.isfinite(value):
        return Verdict(False, f"{value} bits per byte: the evaluation is not finite, the released model stays")
    if model is None:
        return Verdict(True, f"first release: {value:.4f} bits per byte")
    if model.checkpoint_id == evaluation["checkpoint_id"]:
        return Verdict(True, "this checkpoint is the released model already")
    if released is not None:
        bar, basis = metric(released, "bits_per_byte"), "on the same held-out text"
    else:
        bar, basis = model.metrics["bits_per_byte"], "as recorded at its release, on the text of that time"
    comparison = f"{value:.4f} bits per byte; the released model {model.model_id} has {bar:.4f} {basis}"
    if value < bar - config.min_improvement:
        return Verdict(True, comparison)
    return Verdict(False, f"{comparison}: not better by more than {config.min_improvement}, the old release stays")


def evaluate_released(step: Step, evaluation: Evaluation) -> Evaluation | None:
    """The released model on the text of another evaluation; None if it is the same model or cannot be evaluated on it."""
    model, released = released_model(step.storage), released_checkpoint(step.storage)
    if model is None or released is None or released.checkpoint_id == evaluation["checkpoint_id"]:
        return None
    manifest = load_manifest(step.data_dir, evaluation["dataset_id"], evaluation["snapshot_id"])
    if not _can_read(step.data_dir, model.tokenizer_id, manifest):
        step.log.warning(f"the released model {model.model_id} cannot be evaluated on this text: it has another tokenizer")
        return None
    config = EvaluateConfig.model_validate(evaluation["config"])
    return read_evaluation(evaluate(step, released, manifest, config))


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
    return _released_by(storage.released)


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
    for line, pointer in storage.folders.release_lines().items():
        if (model := _released_by(pointer)) is not None:
            lines.setdefault(model.checkpoint_id, []).append(line or "default")
    return lines


def _released_by(pointer: Path) -> ModelRecord | None:
    directory = find_current(pointer)
    return ModelRecord.read(directory) if directory is not None and directory.exists() else None


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
