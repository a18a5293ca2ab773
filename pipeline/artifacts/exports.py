"""Checkpoints as Hugging Face directories, written by the export tool."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from llm_core.artifact_ids import model_id
from llm_core.checkpoint import CheckpointRecord
from llm_core.huggingface import is_intact
from llm_core.layout import RunFolder
from pipeline.artifacts.pointers import set_current
from pipeline.artifacts.step import Step


@contextmanager
def exported(step: Step, record: CheckpointRecord) -> Iterator[Path]:
    """A checkpoint as a Hugging Face directory: the released one if there is one, else one that is removed after the block."""
    directory = step.home.model(model_id(record.checkpoint_id)).root
    if is_intact(directory):
        yield directory
        return
    temporary = RunFolder(record.path.parent).temporary_export(record.step)
    try:
        step.run_tool("llm_core.export", {"checkpoint": record.path, "data_dir": step.data_dir, "output_dir": temporary})
        yield temporary
    finally:
        rmtree(temporary, ignore_errors=True)


def release(step: Step, record: CheckpointRecord, evaluation: Path, reason: str) -> Path:
    """Exports a checkpoint, unless that is done already, and makes it the released model."""
    directory = step.home.model(model_id(record.checkpoint_id)).root
    if not is_intact(directory):
        options = {"checkpoint": record.path, "data_dir": step.data_dir, "output_dir": directory}
        step.run_tool("llm_core.export", options | {"evaluation": evaluation, "reason": reason})
    set_current(step.storage.released, directory)
    return directory
