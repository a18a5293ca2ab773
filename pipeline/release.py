"""When a checkpoint becomes the released model of its line, and what is written then."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from dagster import AssetExecutionContext

from llm_core.checkpoint_files import CheckpointRecord, manifest_path
from llm_core.config import EvaluateConfig, ReleaseConfig
from llm_core.errors import DataError
from llm_core.evaluation_file import Evaluation, metric, read_evaluation
from llm_core.files import inside, read_json, verify_file
from llm_core.identity import model_id
from llm_core.locks import held
from llm_core.shards import DatasetManifest, load_manifest
from llm_core.tokenizer import Tokenizer
from pipeline.current import find_current, set_current
from pipeline.judging import judge
from pipeline.launcher import run_tool
from pipeline.resources import CatalogResource, Storage


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint is released, and why."""

    promoted: bool
    reason: str


def released_model(storage: Storage) -> dict[str, Any] | None:
    """textmill.json of the released model; None before the first release, and once somebody has deleted its directory."""
    return _released_by(storage.released)


def released_lines(storage: Storage) -> dict[str, list[str]]:
    """For each checkpoint that is released now the lines it is released in; the one without a name is "default"."""
    lines: dict[str, list[str]] = {}
    for pointer in sorted(storage.models.glob("released*.json")):
        if (model := _released_by(pointer)) is not None:
            line = pointer.stem.removeprefix("released").removeprefix("_") or "default"
            lines.setdefault(model["checkpoint_id"], []).append(line)
    return lines


def _released_by(pointer: Path) -> dict[str, Any] | None:
    directory = find_current(pointer)
    return read_json(directory / "textmill.json") if directory is not None and directory.exists() else None


def released_checkpoint(storage: Storage, tokenizer_id: str | None = None) -> CheckpointRecord | None:
    """The checkpoint behind the released model; None before the first release, after its deletion, or with another tokenizer."""
    model = released_model(storage)
    if model is None or tokenizer_id not in (None, model["tokenizer_id"]):
        return None
    try:
        return CheckpointRecord.read(manifest_path(inside(storage.checkpoints, f"{model['run_id']}/{model['checkpoint_file']}")))
    except DataError:
        return None


def judge_released(
    context: AssetExecutionContext, storage: Storage, catalog: CatalogResource, evaluation: Evaluation
) -> Evaluation | None:
    """The released model judged on the text of another evaluation; None if it is the same model or cannot be judged on it."""
    model, released = released_model(storage), released_checkpoint(storage)
    if model is None or released is None or released.checkpoint_id == evaluation["checkpoint_id"]:
        return None
    manifest = load_manifest(storage.processed, evaluation["dataset_id"], evaluation["snapshot_id"])
    if not _can_read(storage, model["tokenizer_id"], manifest):
        context.log.warning(f"the released model {model['model_id']} cannot be judged on this text: its tokenizer is another one")
        return None
    config = EvaluateConfig.model_validate(evaluation["config"])
    return read_evaluation(judge(context, storage, catalog, released, manifest, config))


def _can_read(storage: Storage, tokenizer_id: str, manifest: DatasetManifest) -> bool:
    """Whether a model with this tokenizer can be judged on a dataset: text comes back from byte-level tokens alone."""
    if tokenizer_id == manifest.tokenizer.tokenizer_id:
        return True
    try:
        own = Tokenizer.stored(storage.processed, tokenizer_id)
    except DataError:
        return False
    return own.can_read(manifest.tokenizer.tokenizer_id, manifest.tokenizer.tokenizer_type)


@contextmanager
def one_at_a_time(context: AssetExecutionContext, storage: Storage) -> Iterator[None]:
    """Waits for other processes that release: each is to be compared with what the one before it released."""
    with held(storage.models, lambda pid: context.log.info(f"{storage.models}: process {pid} is releasing; waiting for it")):
        yield


def decide(model: dict[str, Any] | None, evaluation: Evaluation, before: Evaluation | None, config: ReleaseConfig) -> Verdict:
    """Compares an evaluated checkpoint with the released model.

    model: textmill.json of the released one, None if there is none. before: its judgement on the same text, where there is one.
    """
    found = metric(evaluation, "bits_per_byte")
    if not math.isfinite(found):
        return Verdict(False, f"{found} bits per byte: the evaluation is not finite, what was released stays")
    if model is None:
        return Verdict(True, f"first release: {found:.4f} bits per byte")
    if model["checkpoint_id"] == evaluation["checkpoint_id"]:
        return Verdict(True, "this checkpoint is the released model already")
    if before is not None:
        bar, basis = metric(before, "bits_per_byte"), "on the same held-out text"
    else:
        bar, basis = model["metrics"]["bits_per_byte"], "as recorded at its release, on the text of that time"
    comparison = f"{found:.4f} bits per byte; the released model {model['model_id']} has {bar:.4f} {basis}"
    if found < bar - config.min_improvement:
        return Verdict(True, comparison)
    return Verdict(False, f"{comparison}: not better by more than {config.min_improvement}, the old release stays")


@contextmanager
def exported(context: AssetExecutionContext, storage: Storage, record: CheckpointRecord) -> Iterator[Path]:
    """A checkpoint as a Hugging Face directory for as long as the block lasts; a released one is where it is anyway."""
    directory = storage.models / model_id(record.checkpoint_id)
    if _is_whole(directory):
        yield directory
        return
    temporary = record.path.with_name(f".{record.path.stem}.exported")
    options = {"checkpoint": record.path, "data_dir": storage.processed, "output_dir": temporary}
    try:
        run_tool(context, "llm_core.export", options)
        yield temporary
    finally:
        rmtree(temporary, ignore_errors=True)


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
            verify_file(inside(directory, name), sha256)
    except DataError:
        return False
    return True
