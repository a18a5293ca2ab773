"""Where a run starts: from nothing, from a checkpoint that is named, or from the newest that is whole."""

import sys
from pathlib import Path
from typing import Literal

from llm_core.checkpoint import TrainingState, load_checkpoint
from llm_core.checkpoint_files import newest_valid
from llm_core.errors import DataError, UserError


def find_resume_state(
    run_dir: Path, checkpoint: str | None, resume: Literal["never", "auto"]
) -> tuple[Path, TrainingState] | None:
    """The state a run goes on from: the named checkpoint, with resume "auto" the newest that verifies, else None.

    Raises:
        UserError: the run directory already holds checkpoints and nothing was said about them.
        DataError: the named checkpoint is damaged, or there are checkpoints and all of them are.
    """
    if checkpoint is not None:
        path = Path(checkpoint)
        return path, load_checkpoint(path)
    record, damaged = newest_valid(run_dir)
    if resume == "never":
        if record is not None or damaged:
            raise UserError(
                f"--save_dir {run_dir}: holds the checkpoints of an earlier run; "
                "continue it with --resume auto or --checkpoint, or choose another folder"
            )
        return None
    if record is None:
        if damaged:
            raise DataError(f"--resume auto: no checkpoint in {run_dir} is whole: {'; '.join(damaged)}")
        return None
    for message in damaged:
        print(f"resume: passed over a checkpoint: {message}", file=sys.stderr, flush=True)
    return record.path, load_checkpoint(record.path)
