"""The checkpoint that a continued run starts from, and the documents it was trained on."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from llm_core.checkpoint.records import CheckpointRecord, RunRecord, named_checkpoint
from llm_core.config import ResolvedTrainConfig, step_before_decay
from llm_core.errors import DataError
from llm_core.layout import RunFolder
from llm_core.system import atomic_writer, parquet_bytes, read_json, read_parquet, verify_file


@dataclass(frozen=True)
class Parent:
    """The checkpoint that another run starts from."""

    checkpoint_id: str
    run_id: str
    step: int
    path: Path | None  # None for a resumed run, which does not need the weights
    known: pa.Array | None  # ids of all documents that it and its own parents have read; None if that is not recorded


def find_parent(init_from: str) -> Parent:
    """The checkpoint of --init_from, a checkpoint file or a run folder.

    For the folder of a run with schedule wsd it is the checkpoint before the decay, the best one to continue from; for any other
    run the newest that verifies.

    Raises:
        UserError: there is no such checkpoint.
        DataError: it is damaged.
    """
    path = Path(init_from)
    record = _before_decay(path) if path.is_dir() else None
    record = record or CheckpointRecord.of(named_checkpoint(init_from, "--init_from"))
    return Parent(record.checkpoint_id, record.run_id, record.step, record.path, _known_documents(record))


def starting_parent(init_from: str | None, resumed_from: Path | None) -> Parent | None:
    """The parent of a run; None without --init_from.

    resumed_from: the checkpoint of a resumed run. Its own folder records the parent, whose files may have changed or be gone.
    """
    if init_from is None:
        return None
    recorded = recorded_parent(resumed_from) if resumed_from is not None else None
    return recorded or find_parent(init_from)


def recorded_parent(checkpoint: Path) -> Parent | None:
    """The parent of a checkpoint's run, from the run's own files; None if they do not record one."""
    run_dir = checkpoint.parent
    run = RunRecord.find(run_dir)
    if run is None or run.run_id != CheckpointRecord.of(checkpoint).run_id or run.parent_checkpoint_id is None:
        return None
    assert run.parent_run_id is not None and run.parent_step is not None, "recorded together with the checkpoint"
    return Parent(run.parent_checkpoint_id, run.parent_run_id, run.parent_step, None, _inherited(run_dir, run))


def write_known_documents(run_dir: Path, known: pa.Array) -> str:
    """Writes the documents that a run's parents have read; returns the file's SHA-256."""
    with atomic_writer(RunFolder(run_dir).known_documents) as file:
        file.write(parquet_bytes(pa.table({"document_id": known})))
        return file.sha256()


def _known_documents(record: CheckpointRecord) -> pa.Array | None:
    run_dir = record.path.parent
    run, steps = RunRecord.find(run_dir), RunFolder(run_dir).document_steps
    if run is None or run.run_id != record.run_id or run.document_steps_sha256 is None or not steps.is_file():
        return None
    verify_file(steps, run.document_steps_sha256)
    own = read_parquet(steps)
    seen = own.filter(pc.less(own["first_step"], record.step))["document_id"]
    inherited = pa.array([], pa.large_string()) if run.parent_run_id is None else _inherited(run_dir, run)
    seen = seen.cast(pa.large_string())
    return None if inherited is None else pc.unique(pa.chunked_array([*seen.chunks, inherited], pa.large_string()))


def _inherited(run_dir: Path, run: RunRecord) -> pa.Array | None:
    if run.known_documents_sha256 is None:
        return None
    path = RunFolder(run_dir).known_documents
    verify_file(path, run.known_documents_sha256)
    return read_parquet(path)["document_id"].cast(pa.large_string()).combine_chunks()


def _before_decay(run_dir: Path) -> CheckpointRecord | None:
    try:
        config = ResolvedTrainConfig.model_validate(read_json(RunFolder(run_dir).config))
        if (step := step_before_decay(config)) is None:
            return None
        return CheckpointRecord.of(RunFolder(run_dir).checkpoint(step))
    except (DataError, ValueError):
        return None
