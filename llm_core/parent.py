"""The checkpoint that a run continues from, and the documents that checkpoint has seen."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llm_core.checkpoint_files import CheckpointRecord, checkpoint_path, manifest_path, newest_valid
from llm_core.config import TrainConfig
from llm_core.errors import DataError, UserError
from llm_core.files import atomic_writer, read_json
from llm_core.schedule import decay_start
from llm_core.tables import parquet_bytes

DOCUMENT_STEPS = "document_steps.parquet"
KNOWN_DOCUMENTS = "known_documents.parquet"


def find_parent(init_from: str) -> CheckpointRecord:
    """The checkpoint behind --init_from, a checkpoint file or a run's folder.

    Of a run with the schedule wsd a folder means the checkpoint before the decay, from which training goes on best; of any
    other run the newest that verifies.

    Raises:
        UserError: there is no such checkpoint.
        DataError: it is damaged.
    """
    path = Path(init_from)
    if path.is_dir():
        found = _before_decay(path) or newest_valid(path)[0]
        if found is None:
            raise UserError(
                f"--init_from {init_from}: no whole checkpoint in this folder; name a checkpoint_step_<N>.pt or its folder"
            )
        return found
    if not manifest_path(path).is_file():
        raise UserError(
            f"--init_from {init_from}: no such checkpoint; name a checkpoint_step_<N>.pt (with its .json) or its folder"
        )
    return CheckpointRecord.read(manifest_path(path))


def known_documents(parent: CheckpointRecord) -> pa.Array | None:
    """Ids of all documents that a checkpoint has seen, those of its own parents included; None where its run does not say."""
    run_dir = parent.path.parent
    state = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    if state.get("run_id") != parent.run_id or not (run_dir / DOCUMENT_STEPS).is_file():
        return None
    own = pq.read_table(run_dir / DOCUMENT_STEPS)
    seen = own.filter(pc.less(own["first_step"], parent.step))["document_id"]
    inherited = pa.chunked_array([], pa.string())
    if state["parent_checkpoint_id"] is not None:
        if not (run_dir / KNOWN_DOCUMENTS).is_file():
            return None
        inherited = pq.read_table(run_dir / KNOWN_DOCUMENTS)["document_id"]
    return pc.unique(pa.chunked_array([*seen.chunks, *inherited.chunks], pa.string()))


def write_known_documents(run_dir: Path, known: pa.Array) -> None:
    """Keeps what a run's parents have seen beside what it sees itself."""
    with atomic_writer(run_dir / KNOWN_DOCUMENTS) as file:
        file.write(parquet_bytes(pa.table({"document_id": known})))


def _before_decay(run_dir: Path) -> CheckpointRecord | None:
    try:
        config = TrainConfig.model_validate(read_json(run_dir / "config.json"))
        if config.lr_schedule != "wsd":
            return None
        return CheckpointRecord.read(manifest_path(checkpoint_path(run_dir, decay_start(config))))
    except (DataError, ValueError):
        return None
