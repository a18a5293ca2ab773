"""Where a run starts: from scratch, from a given checkpoint, or from the newest intact one. Rank 0 only."""

import sys
from pathlib import Path
from typing import Literal

from llm_core.checkpoint.records import CheckpointRecord, RunRecord, named_checkpoint
from llm_core.checkpoint.state import TrainingState, load_checkpoint
from llm_core.errors import DataError, UserError
from llm_core.layout import RunFolder, step_of_manifest


def find_resume_state(
    run_dir: Path, checkpoint: str | None, resume: Literal["never", "auto"]
) -> tuple[Path, TrainingState] | None:
    """The checkpoint to resume from: the given one, with resume "auto" the newest that verifies, else None.

    Raises:
        UserError: the run folder has checkpoints and no option says what to do with them.
        DataError: the given checkpoint is damaged, or all checkpoints are.
    """
    if checkpoint is not None:
        path = named_checkpoint(checkpoint)
        return path, load_checkpoint(path)
    manifests = RunFolder(run_dir).checkpoint_manifests()
    if resume == "never":
        if manifests:
            raise UserError(
                f"--save_dir {run_dir}: has the checkpoints of an earlier run; "
                "continue it with --resume auto or --checkpoint, or choose another folder"
            )
        return None
    return _newest_loadable(run_dir, manifests)


def _newest_loadable(run_dir: Path, manifests: list[Path]) -> tuple[Path, TrainingState] | None:
    """The first checkpoint that loads; logs each one that it skips."""
    damaged: list[str] = []
    for manifest in manifests:
        try:
            path = CheckpointRecord.read(manifest).path
            state = load_checkpoint(path)
        except DataError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            print(f"resume: skipped a checkpoint: {message}", file=sys.stderr, flush=True)
        return path, state
    if damaged:
        raise DataError(f"--resume auto: no checkpoint in {run_dir} is intact: {'; '.join(damaged)}")
    return None


def set_later_checkpoints_aside(run_dir: Path, run_id: str, step: int) -> list[Path]:
    """Moves checkpoints after `step`, intact or not, out of the way of a run that resumes at `step`.

    Otherwise they would count as this run's own and outlive its newest ones. Returns their new paths.

    Raises:
        UserError: the folder has the checkpoints of another run.
    """
    manifests = RunFolder(run_dir).checkpoint_manifests()
    if manifests and (owner := RunRecord.find(run_dir)) is not None and owner.run_id != run_id:
        raise UserError(
            f"--save_dir {run_dir}: has the checkpoints of run {owner.run_id}, this is run {run_id}; choose another folder"
        )
    moved, folder = [], RunFolder(run_dir).later_checkpoints
    for manifest in manifests:
        if (step_of_manifest(manifest) or 0) > step:
            folder.mkdir(exist_ok=True)
            for path in (manifest, manifest.with_suffix("")):  # the manifest first: without it there is no checkpoint
                if path.exists():
                    moved.append(path.rename(folder / path.name))
    return moved
