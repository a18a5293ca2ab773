"""Which checkpoints a run directory holds, told by their manifests alone.

`checkpoint_step_<N>.pt` is written first, its manifest `checkpoint_step_<N>.pt.json` with size and SHA-256 last: a checkpoint
without a manifest does not exist. Truth is the highest step whose file matches its manifest; `latest.json` is only a hint.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from llm_core.errors import DataError, UserError
from llm_core.files import fsync_path, read_json, verify_file

FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint_step_(\d+)\.pt\.json")


@dataclass(frozen=True)
class CheckpointRecord:
    """What the manifest of one checkpoint says."""

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
        """Raises DataError where the manifest is damaged or of another format."""
        value = read_json(manifest_path)
        try:
            if value["format_version"] != FORMAT_VERSION:
                raise DataError(f"{manifest_path}: format {value['format_version']}, this version reads format {FORMAT_VERSION}")
            if value["file"] != manifest_path.name.removesuffix(".json"):
                raise DataError(f"{manifest_path}: damaged, it is the manifest of another file, {value['file']!r}")
            names = ("checkpoint_id", "run_id", "step", "tokens_seen", "val_loss", "sha256", "bytes")
            return cls(**{name: value[name] for name in names}, path=manifest_path.with_name(value["file"]))
        except KeyError as error:
            raise DataError(f"{manifest_path}: damaged, field {error} is missing") from None


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoint_step_{step}.pt"


def manifest_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".json")


def checkpoint_manifests(run_dir: Path) -> list[Path]:
    """The manifests in a run directory, of the newest checkpoint first, unread."""
    found = [(int(match[1]), path) for path in run_dir.glob("*.json") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def step_of(manifest: Path) -> int:
    """The step in the name of a manifest that `checkpoint_manifests` found."""
    match = _NAME.fullmatch(manifest.name)
    assert match is not None, manifest
    return int(match[1])


def newest_valid(run_dir: Path) -> tuple[CheckpointRecord | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over."""
    damaged = []
    for path in checkpoint_manifests(run_dir):
        try:
            record = CheckpointRecord.read(path)
            verify_file(record.path, record.sha256)
        except DataError as error:
            damaged.append(str(error))
        else:
            return record, damaged
    return None, damaged


def named_checkpoint(checkpoint: str, option: str = "--checkpoint") -> Path:
    """The checkpoint that an option names: the file itself, or of a run's folder the newest that is whole.

    Raises:
        UserError: there is no such checkpoint.
    """
    path, remedy = Path(checkpoint), "name a checkpoint_step_<N>.pt in the folder it was written to, or that folder"
    if path.is_dir():
        record, _ = newest_valid(path)
        if record is None:
            raise UserError(f"{option} {checkpoint}: no whole checkpoint in this folder; {remedy}")
        return record.path
    if not manifest_path(path).is_file():
        found = "it has no manifest (.json), so it may not be whole" if path.is_file() else "no such file"
        raise UserError(f"{option} {checkpoint}: {found}; {remedy}")
    return path


def sound_records(run_dir: Path) -> list[CheckpointRecord]:
    """The checkpoints of a run directory that look whole, the newest first; their bytes are not read."""
    records = []
    for path in checkpoint_manifests(run_dir):
        try:
            record = CheckpointRecord.read(path)
        except DataError:
            continue
        if record.path.is_file() and record.path.stat().st_size == record.bytes:
            records.append(record)
    return records


def prune_checkpoints(run_dir: Path, keep: int, keep_step: int | None = None) -> list[Path]:
    """Deletes all but the newest `keep` checkpoints, the best validated one and that of `keep_step`, manifests first.

    What a deletion or a save left without a manifest, when it was killed, goes with them.

    Returns:
        What was deleted.
    """
    records = sound_records(run_dir)  # a damaged one must not count as kept
    validated = [record for record in records if record.val_loss is not None and math.isfinite(record.val_loss)]
    best = min(validated, key=lambda record: (record.val_loss, -record.step), default=None)
    deleted = []
    for record in records[keep:]:
        if record != best and record.step != keep_step:
            manifest_path(record.path).unlink(missing_ok=True)
            fsync_path(run_dir)
            record.path.unlink(missing_ok=True)
            deleted.append(record.path)
    for path in run_dir.glob("checkpoint_step_*.pt"):
        manifest = manifest_path(path)
        older = records and _NAME.fullmatch(manifest.name) and step_of(manifest) < records[0].step
        if older and path.is_file() and not manifest.exists():
            path.unlink(missing_ok=True)
            deleted.append(path)
    return deleted
