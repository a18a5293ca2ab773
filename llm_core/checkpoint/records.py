"""The JSON records of a run folder: run.json, and the manifest of each checkpoint.

`checkpoint_step_<N>.pt` is written first and its manifest, with size and SHA-256, last: a checkpoint without a manifest does not
exist. The newest checkpoint is the highest step whose file matches its manifest.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from llm_core.errors import DataError, UserError
from llm_core.layout import RunFolder, checkpoint_manifest
from llm_core.system import fsync_path, now, parse_record, read_json, verify_file, write_json

CHECKPOINT_FORMAT = 1

# Format 1 repeated config.json in run.json and is still read.
RUN_FORMAT = 2


@dataclass(frozen=True)
class CheckpointRecord:
    """The manifest of one checkpoint."""

    checkpoint_id: str
    run_id: str
    step: int
    tokens_seen: int
    val_loss: float | None
    sha256: str
    bytes: int
    path: Path

    @classmethod
    def read(cls, manifest_path: Path) -> "CheckpointRecord":
        """Reads a checkpoint's manifest.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        value = read_json(manifest_path)
        try:
            if value["format_version"] != CHECKPOINT_FORMAT:
                raise DataError(
                    f"{manifest_path}: format {value['format_version']}, this version reads format {CHECKPOINT_FORMAT}"
                )
            if value["file"] != manifest_path.name.removesuffix(".json"):
                raise DataError(f"{manifest_path}: damaged, it names another file, {value['file']!r}")
            names = ("checkpoint_id", "run_id", "step", "tokens_seen", "val_loss", "sha256", "bytes")
            return cls(**{name: value[name] for name in names}, path=manifest_path.with_name(value["file"]))
        except KeyError as error:
            raise DataError(f"{manifest_path}: damaged, field {error} is missing") from None

    @classmethod
    def of(cls, checkpoint: Path) -> "CheckpointRecord":
        """The record of a checkpoint file; see `read`."""
        return cls.read(checkpoint_manifest(checkpoint))

    def fields(self) -> dict[str, Any]:
        """Everything that is recorded of it; where it is depends on the folder."""
        return {name: value for name, value in vars(self).items() if name != "path"}


class GroupUsage(BaseModel):
    """What a run reads of one group of documents."""

    model_config = ConfigDict(frozen=True)

    group: str = Field(validation_alias=AliasChoices("group", "part"))  # "part" in run records of format 1
    windows: int
    windows_read: int  # repetitions included
    share: float  # of all windows read
    epochs: float


class RunRecord(BaseModel):
    """run.json: what a training run is and how far it got.

    Fields with a default are missing in records of older versions.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int = RUN_FORMAT
    run_id: str
    dataset_id: str
    snapshot_id: str | None = None  # that the raw files of the documents were taken from
    tokenizer_id: str
    parent_run_id: str | None  # whose weights the run started from
    parent_step: int | None
    parent_checkpoint_id: str | None = None
    mixture: list[GroupUsage] = []
    document_steps_sha256: str | None = None
    known_documents_sha256: str | None = None  # None where nothing recorded what the parents have read
    config_sha256: str | None = None  # of config.json
    config: dict[str, Any] | None = Field(None, exclude=True)  # format 1 repeated config.json here
    seed: int
    code_version: str
    git_commit: str | None
    status: Literal["running", "finished", "preempted", "failed"]
    started_at: str
    finished_at: str | None
    error: str | None
    resumed_from_step: int = 0
    steps_done: int
    tokens_seen: int
    skipped_steps: int
    parameters: int
    flops_per_token: int = 0
    world_size: int
    threads: int  # of each rank
    device: str
    precision: str
    attention: str
    micro_batch_size: int = 0
    accumulation_steps: int = 0
    torch_version: str
    seconds_by_phase: dict[str, float] = {}
    removed_at: str | None = None  # when garbage collection removed the checkpoints

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """The record of the run in a folder.

        Raises:
            DataError: there is none, it is damaged, or a newer textmill wrote it.
        """
        path = RunFolder(run_dir).record
        value = read_json(path)
        if isinstance(version := value.get("format_version"), int) and version > RUN_FORMAT:
            raise DataError(f"{path}: format {version}, this version reads formats 1 and 2; use a newer textmill")
        return parse_record(path, value, cls)

    @classmethod
    def find(cls, run_dir: Path) -> "RunRecord | None":
        """`read`, or None where no run has started in the folder."""
        return cls.read(run_dir) if RunFolder(run_dir).record.exists() else None

    def write(self, run_dir: Path) -> None:
        write_json(RunFolder(run_dir).record, self.model_dump(mode="json"))

    @staticmethod
    def mark_removed(run_dir: Path, snapshot_id: str | None) -> None:
        """Records that the checkpoints are removed. All other fields stay, those of other versions included.

        snapshot_id: for a run that has not recorded it.
        """
        path = RunFolder(run_dir).record
        fields = read_json(path)
        write_json(path, fields | {"removed_at": now(), "snapshot_id": fields.get("snapshot_id") or snapshot_id})

    def train_config(self, run_dir: Path) -> dict[str, Any]:
        """The resolved options of the run.

        Raises:
            DataError: config.json is missing or not the one that the run was started with.
        """
        if self.config is not None:
            return self.config
        path = RunFolder(run_dir).config
        if self.config_sha256 is not None:
            verify_file(path, self.config_sha256)
        return read_json(path)


def newest_valid(run_dir: Path) -> tuple[CheckpointRecord | None, list[str]]:
    """The newest checkpoint that verifies, and the problem of each newer one."""
    damaged = []
    for path in RunFolder(run_dir).checkpoint_manifests():
        try:
            record = CheckpointRecord.read(path)
            verify_file(record.path, record.sha256)
        except DataError as error:
            damaged.append(str(error))
        else:
            return record, damaged
    return None, damaged


def named_checkpoint(checkpoint: str, option: str = "--checkpoint") -> Path:
    """The checkpoint that an option names: a checkpoint file, or a run folder for its newest intact one.

    Raises:
        UserError: there is no such checkpoint.
    """
    path, remedy = Path(checkpoint), "name a checkpoint_step_<N>.pt in its run folder, or the run folder"
    if path.is_dir():
        if removed := _why_removed(path):
            raise UserError(f"{option} {checkpoint}: {removed}")
        record, _ = newest_valid(path)
        if record is None:
            raise UserError(f"{option} {checkpoint}: no intact checkpoint in this folder; {remedy}")
        return record.path
    if not checkpoint_manifest(path).is_file():
        if removed := _why_removed(path.parent):
            raise UserError(f"{option} {checkpoint}: {removed}")
        found = "it has no manifest (.json), so it may be incomplete" if path.is_file() else "no such file"
        raise UserError(f"{option} {checkpoint}: {found}; {remedy}")
    return path


def _why_removed(run_dir: Path) -> str | None:
    """That garbage collection has removed the checkpoints of a run; None if it has not."""
    run = RunRecord.find(run_dir)
    if run is None or run.removed_at is None:
        return None
    return (
        f"the checkpoints of run {run.run_id} were removed on {run.removed_at[:10]} by garbage collection; name a run that "
        "`textmill runs` does not list as removed, or train it again with its options"
    )


def intact_checkpoints(run_dir: Path) -> list[CheckpointRecord]:
    """Checkpoints of a run folder with an intact manifest and the right size, the newest first; digests are not checked."""
    records = []
    for path in RunFolder(run_dir).checkpoint_manifests():
        try:
            record = CheckpointRecord.read(path)
        except DataError:
            continue
        if record.path.is_file() and record.path.stat().st_size == record.bytes:
            records.append(record)
    return records


def prune_checkpoints(run_dir: Path, keep: int, keep_step: int | None = None) -> list[Path]:
    """Deletes all checkpoints but the newest `keep`, the one with the best validation loss, and that of `keep_step`.

    Manifests are deleted first. Older checkpoints without a manifest, left by a killed process, are deleted too.

    Returns:
        The deleted files.
    """
    records = intact_checkpoints(run_dir)  # a damaged one does not count
    validated = [record for record in records if record.val_loss is not None and math.isfinite(record.val_loss)]
    best = min(validated, key=lambda record: (record.val_loss, -record.step), default=None)
    deleted = []
    for record in records[keep:]:
        if record != best and record.step != keep_step:
            checkpoint_manifest(record.path).unlink(missing_ok=True)
            fsync_path(run_dir)
            record.path.unlink(missing_ok=True)
            deleted.append(record.path)
    for step, path in RunFolder(run_dir).checkpoints():
        older = records and step < records[0].step
        if older and path.is_file() and not checkpoint_manifest(path).exists():
            path.unlink(missing_ok=True)
            deleted.append(path)
    return deleted
