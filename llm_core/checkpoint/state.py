"""The content of a checkpoint, saved and loaded completely and verified, or not at all."""

import datetime
import pickle
import shutil
import sys
from pathlib import Path
from typing import IO, Any, TypedDict, cast

import torch

from llm_core.checkpoint.records import CHECKPOINT_FORMAT, CheckpointRecord
from llm_core.config import ModelConfig
from llm_core.errors import DataError, UserError
from llm_core.layout import RunFolder, checkpoint_manifest
from llm_core.model.transformer import Transformer
from llm_core.system import atomic_writer, content_id, verify_file, write_json


class RunIdentity(TypedDict):
    """What identifies a run."""

    run_id: str
    dataset_id: str
    tokenizer_id: str
    parent_checkpoint_id: str | None
    eot_id: int
    model_config: dict[str, Any]
    train_config: dict[str, Any]


class TrainingState(RunIdentity):
    """Everything a run needs to continue as if it had never stopped."""

    model: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    step: int  # optimizer steps done; also the 0-based number of the next one
    tokens_seen: int
    skipped_steps: int
    skipped_in_a_row: int
    precision: str  # a run can continue in another one on another kind of device


def save_checkpoint(run_dir: Path, state: TrainingState, val_loss: float | None) -> CheckpointRecord:
    """Writes a checkpoint and its manifest; both are on disk when this returns.

    Raises:
        DataError: the disk is too full; earlier checkpoints are untouched.
        OSError: a write failed; the same holds.
    """
    _require_space(run_dir, state)
    path = RunFolder(run_dir).checkpoint(state["step"])
    manifest = checkpoint_manifest(path)
    manifest.unlink(missing_ok=True)  # a rewritten checkpoint must never have the old digest
    with atomic_writer(path) as file:
        try:
            torch.save(_canonical(state), cast(IO[bytes], file))
        except RuntimeError as error:  # raised by PyTorch when it cannot complete the file
            raise file.error or error from None
    sha256 = file.sha256()
    record = CheckpointRecord(
        checkpoint_id=content_id(state["run_id"], state["step"], sha256),
        run_id=state["run_id"],
        step=state["step"],
        tokens_seen=state["tokens_seen"],
        val_loss=val_loss,
        sha256=sha256,
        bytes=file.bytes_written,
        path=path,
    )
    created_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(manifest, record.fields() | {"format_version": CHECKPOINT_FORMAT, "file": path.name, "created_at": created_at})
    return record


def load_checkpoint(path: Path) -> TrainingState:
    """Reads a checkpoint after verifying it against its manifest; never runs code from the file.

    Raises:
        DataError: the checkpoint or its manifest is missing, damaged or of another kind.
    """
    record = CheckpointRecord.of(path)
    verify_file(path, record.sha256)
    try:
        state: TrainingState = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error})") from None
    missing = TrainingState.__required_keys__ - state.keys() if isinstance(state, dict) else {"all"}
    if missing:
        raise DataError(f"{path}: not a checkpoint of this version, it lacks {', '.join(sorted(missing))}")
    return state


def load_model(path: Path) -> tuple[Transformer, TrainingState]:
    """The model of a checkpoint on the CPU in evaluation mode, and its training state."""
    state = load_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(ModelConfig.model_validate(state["model_config"]), state["eot_id"])
    model.materialize(torch.device("cpu"))
    model.load_state_dict(state["model"], strict=True)
    return model.eval(), state


def require_same(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raises UserError naming each field in which a checkpoint differs from the run that loads it, with both values."""
    differing = [name for name in sorted(saved.keys() | present.keys()) if saved.get(name) != present.get(name)]
    # The run id follows from all other fields; it is named only if nothing else differs.
    named = [name for name in differing if name != "run_id"] or differing
    if named:
        differences = [f"{name} is {saved.get(name)} in the checkpoint and {present.get(name)} now" for name in named]
        remedy = "use the options and the data that it was made with"
        if "dataset_id" in named:
            remedy += f" (--dataset_id {saved.get('dataset_id')} is its text, without newer documents)"
        raise UserError(
            f"{path}: does not fit this run: {'; '.join(differences)}; {remedy},"
            " or start a new run from its weights with --init_from and another --save_dir"
        )


def _canonical(value: Any) -> Any:
    """The same value with a canonical sharing of objects, so that equal states pickle to equal bytes, resumed or not."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_canonical(item) for item in value])
    return sys.intern(value) if isinstance(value, str) else value


def _require_space(run_dir: Path, state: TrainingState) -> None:
    moments = (value for saved in state["optimizers"] for entry in saved["state"].values() for value in entry.values())
    tensors = [tensor for tensor in (*state["model"].values(), *moments) if isinstance(tensor, torch.Tensor)]
    once = {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors}  # a tied matrix is saved once
    needed = sum(once.values()) + (1 << 16)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise DataError(
            f"{run_dir}: disk full, a checkpoint needs {needed:,} bytes and {needed - free:,} are missing; free them and resume"
        )
