"""The checkpoint that a run continues from, and the documents that checkpoint has seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.checkpoint_files import CheckpointRecord, checkpoint_path, manifest_path, named_checkpoint
from llm_core.config import TrainConfig
from llm_core.errors import DataError
from llm_core.files import atomic_writer, read_json, verify_file
from llm_core.schedule import decay_start
from llm_core.tables import parquet_bytes, read_parquet

DOCUMENT_STEPS = "document_steps.parquet"
KNOWN_DOCUMENTS = "known_documents.parquet"


@dataclass(frozen=True)
class Parent:
    """A checkpoint as the beginning of another run."""

    checkpoint_id: str
    run_id: str
    step: int
    path: Path | None  # None where the run has begun already and needs the weights no more
    known: pa.Array | None  # ids of all documents that it and its own parents have seen; None where nobody recorded that


def find_parent(init_from: str) -> Parent:
    """The checkpoint behind --init_from, a checkpoint file or a run's folder.

    Of a run with the schedule wsd a folder means the checkpoint before the decay, from which training goes on best; of any
    other run the newest that verifies.

    Raises:
        UserError: there is no such checkpoint.
        DataError: it is damaged.
    """
    path = Path(init_from)
    record = _before_decay(path) if path.is_dir() else None
    record = record or CheckpointRecord.read(manifest_path(named_checkpoint(init_from, "--init_from")))
    return Parent(record.checkpoint_id, record.run_id, record.step, record.path, _known_documents(record))


def recorded_parent(checkpoint: Path) -> Parent | None:
    """The parent of the run that a checkpoint belongs to, as that run's own files tell; they outlive the parent's."""
    run_dir = checkpoint.parent
    state = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    if state.get("run_id") != CheckpointRecord.read(manifest_path(checkpoint)).run_id or state["parent_run_id"] is None:
        return None
    return Parent(state["parent_checkpoint_id"], state["parent_run_id"], state["parent_step"], None, _inherited(run_dir, state))


def write_known_documents(run_dir: Path, known: pa.Array) -> str:
    """Keeps what a run's parents have seen beside what it sees itself; returns the file's SHA-256."""
    with atomic_writer(run_dir / KNOWN_DOCUMENTS) as file:
        file.write(parquet_bytes(pa.table({"document_id": known})))
        return file.sha256()


def _known_documents(record: CheckpointRecord) -> pa.Array | None:
    run_dir = record.path.parent
    state = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    if state.get("run_id") != record.run_id or not (run_dir / DOCUMENT_STEPS).is_file():
        return None
    verify_file(run_dir / DOCUMENT_STEPS, state["document_steps_sha256"])
    own = read_parquet(run_dir / DOCUMENT_STEPS)
    seen = own.filter(pc.less(own["first_step"], record.step))["document_id"]
    inherited = pa.array([], pa.large_string()) if state["parent_run_id"] is None else _inherited(run_dir, state)
    seen = seen.cast(pa.large_string())
    return None if inherited is None else pc.unique(pa.chunked_array([*seen.chunks, inherited], pa.large_string()))


def _inherited(run_dir: Path, state: dict[str, Any]) -> pa.Array | None:
    if state["known_documents_sha256"] is None:
        return None
    verify_file(run_dir / KNOWN_DOCUMENTS, state["known_documents_sha256"])
    return read_parquet(run_dir / KNOWN_DOCUMENTS)["document_id"].cast(pa.large_string()).combine_chunks()


def _before_decay(run_dir: Path) -> CheckpointRecord | None:
    try:
        config = TrainConfig.model_validate(read_json(run_dir / "config.json"))
        if config.lr_schedule != "wsd":
            return None
        return CheckpointRecord.read(manifest_path(checkpoint_path(run_dir, decay_start(config))))
    except (DataError, ValueError):
        return None
