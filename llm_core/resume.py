"""Where a run starts: from nothing, from a checkpoint that is named, or from the newest that is whole. Main rank only."""

import sys
from pathlib import Path
from typing import Literal

from llm_core.checkpoint import TrainingState, load_checkpoint
from llm_core.checkpoint_files import CheckpointRecord, checkpoint_manifests, named_checkpoint, step_of
from llm_core.errors import DataError, UserError
from llm_core.files import read_json

SET_ASIDE = "set_aside"


def find_resume_state(
    run_dir: Path, checkpoint: str | None, resume: Literal["never", "auto"]
) -> tuple[Path, TrainingState] | None:
    """The state a run goes on from: the named checkpoint, with resume "auto" the newest that verifies, else None.

    Raises:
        UserError: the run directory already holds checkpoints and nothing was said about them.
        DataError: the named checkpoint is damaged, or there are checkpoints and all of them are.
    """
    if checkpoint is not None:
        path = named_checkpoint(checkpoint)
        return path, load_checkpoint(path)
    manifests = checkpoint_manifests(run_dir)
    if resume == "never":
        if manifests:
            raise UserError(
                f"--save_dir {run_dir}: holds the checkpoints of an earlier run; "
                "continue it with --resume auto or --checkpoint, or choose another folder"
            )
        return None
    damaged: list[str] = []
    for manifest in manifests:
        try:
            path = CheckpointRecord.read(manifest).path
            state = load_checkpoint(path)
        except DataError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            print(f"resume: passed over a checkpoint: {message}", file=sys.stderr, flush=True)
        return path, state
    if damaged:
        raise DataError(f"--resume auto: no checkpoint in {run_dir} is whole: {'; '.join(damaged)}")
    return None


def make_room(run_dir: Path, run_id: str, step: int) -> list[Path]:
    """Prepares a run directory for a run that goes on at `step`: checkpoints after it, whole or not, are set aside.

    They would be taken for this run's own past, and outlive its newest ones. Returns where they are now.

    Raises:
        UserError: the directory holds the checkpoints of another run.
    """
    manifests = checkpoint_manifests(run_dir)
    if manifests and (run_dir / "run.json").is_file():
        owner = read_json(run_dir / "run.json")["run_id"]
        if owner != run_id:
            raise UserError(
                f"--save_dir {run_dir}: holds the checkpoints of run {owner}, this is run {run_id}; choose another folder"
            )
    moved = []
    for manifest in manifests:
        if step_of(manifest) > step:
            (run_dir / SET_ASIDE).mkdir(exist_ok=True)
            for path in (manifest, manifest.with_suffix("")):  # the manifest first: without it there is no checkpoint
                if path.exists():
                    moved.append(path.rename(run_dir / SET_ASIDE / path.name))
    return moved
