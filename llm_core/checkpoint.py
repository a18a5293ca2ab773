"""What a checkpoint holds, and how it is saved and loaded: complete and verified, or not at all."""

import datetime
import pickle
import shutil
import sys
from pathlib import Path
from typing import IO, Any, TypedDict, cast

import torch

from llm_core.checkpoint_files import FORMAT_VERSION, CheckpointRecord, checkpoint_path, manifest_path
from llm_core.config import ModelConfig
from llm_core.errors import DataError, UserError
from llm_core.files import atomic_writer, content_id, verify_file, write_json
from llm_core.model import Transformer


class Facts(TypedDict):
    """What a run is; two runs with other facts are other runs."""

    run_id: str
    dataset_id: str
    tokenizer_id: str
    parent_checkpoint_id: str | None
    eot_id: int
    model_config: dict[str, Any]
    train_config: dict[str, Any]


class TrainingState(Facts):
    """Everything a run needs to go on as if it had never stopped."""

    model: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]
    scaler: dict[str, Any]
    step: int  # optimizer steps done; also the 0-based number of the next one
    tokens_seen: int
    skipped_steps: int
    skipped_in_a_row: int
    precision: str  # that the run was using; on another kind of device it may go on in another


def save_checkpoint(run_dir: Path, state: TrainingState, val_loss: float | None) -> CheckpointRecord:
    """Writes one checkpoint; when this returns it is on disk and named by its manifest.

    Raises:
        DataError: the disk is too full; earlier checkpoints are untouched.
        OSError: the disk refused a write; likewise.
    """
    _require_space(run_dir, state)
    path = checkpoint_path(run_dir, state["step"])
    manifest = manifest_path(path)
    manifest.unlink(missing_ok=True)  # a rewritten checkpoint never stands under the old digest
    with atomic_writer(path) as file:
        try:
            torch.save(_canonical(state), cast(IO[bytes], file))
        except RuntimeError as error:  # PyTorch's, about a file that it could not end
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
    fields = {name: value for name, value in vars(record).items() if name != "path"}
    created_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(manifest, fields | {"format_version": FORMAT_VERSION, "file": path.name, "created_at": created_at})
    write_json(run_dir / "latest.json", {"step": record.step, "file": path.name})
    return record


def load_checkpoint(path: Path) -> TrainingState:
    """Reads one checkpoint after checking it against its manifest; runs no code that the file may hold.

    Raises:
        DataError: the checkpoint or its manifest is missing, damaged or not one of ours.
    """
    record = CheckpointRecord.read(manifest_path(path))
    verify_file(path, record.sha256)
    try:
        state: TrainingState = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error})") from None
    missing = TrainingState.__required_keys__ - state.keys() if isinstance(state, dict) else {"all"}
    if missing:
        raise DataError(f"{path}: not a checkpoint of this version, {', '.join(sorted(missing))} is missing in it")
    return state


def load_model(path: Path) -> tuple[Transformer, TrainingState]:
    """Rebuilds the model of a checkpoint, on the CPU and in evaluation mode."""
    state = load_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(ModelConfig.model_validate(state["model_config"]), state["eot_id"])
    model.materialize(torch.device("cpu"))
    model.load_state_dict(state["model"], strict=True)
    return model.eval(), state


def require_same(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raises UserError naming each field in which a checkpoint differs from the run that wants it, with both values."""
    differing = [name for name in sorted(saved.keys() | present.keys()) if saved.get(name) != present.get(name)]
    # The run's id follows from all the others; it is told where nothing else explains it.
    told = [name for name in differing if name != "run_id"] or differing
    if told:
        differences = [f"{name} is {saved.get(name)} in the checkpoint and {present.get(name)} now" for name in told]
        remedy = "give the options and the data that it was made with"
        if "dataset_id" in told:
            remedy += f" (--dataset_id {saved.get('dataset_id')} is its text, without what came since)"
        raise UserError(
            f"{path}: does not fit this run: {'; '.join(differences)}; {remedy},"
            " or begin a new run from its weights with --init_from"
        )


def _canonical(value: Any) -> Any:
    """The same value with objects shared in one way only, so that equal states pickle to equal bytes, resumed or not."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_canonical(item) for item in value])
    return sys.intern(value) if isinstance(value, str) else value


def _require_space(run_dir: Path, state: TrainingState) -> None:
    moments = (value for saved in state["optimizers"] for entry in saved["state"].values() for value in entry.values())
    tensors = [tensor for tensor in (*state["model"].values(), *moments) if isinstance(tensor, torch.Tensor)]
    once = {(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors}  # a tied matrix is written once
    needed = sum(once.values()) + (1 << 16)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise DataError(
            f"{run_dir}: disk full, a checkpoint needs {needed:,} bytes and {needed - free:,} are missing; free them and resume"
        )
