"""The training tool: `python -m llm_core.train ...`, on its own or under torchrun for several processes and machines."""

import os
import sys
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a plain file: find the package, not its modules

from llm_core.interrupts import EXIT_CODE, exit_on_interrupt, raise_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

from llm_core.system import restrict_umask  # early: records the parent pid before PyTorch takes seconds to load

# OpenMP reads this when PyTorch loads it: waiting threads sleep instead of spinning, which would slow down a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pydantic import Field

from llm_core.checkpoint import starting_parent
from llm_core.cli import error_message, parse_options
from llm_core.config import TrainConfig
from llm_core.dataset import load_manifest
from llm_core.distributed.launch import StopRequest, join_ranks, run_rank
from llm_core.distributed.ranks import Ranks
from llm_core.errors import Preempted, TextmillError
from llm_core.training import Callback, resolve
from llm_core.training.cost import explain
from llm_core.training.planner import planned
from llm_core.training.run import require_same_options, train
from llm_core.training.run_data import TrainingData

PROG = "python -m llm_core.train"


class TrainOptions(TrainConfig):
    """Train a decoder language model on prepared data."""

    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    dataset_id: str | None = Field(
        None, description="Dataset version to train on, a name in manifests/; default: the current one."
    )
    snapshot_id: str | None = Field(
        None, description="With dataset_id: the snapshot that defines the source of each document; default: the dataset's own."
    )
    save_dir: str | None = Field(
        None,
        description="Folder for checkpoints, metrics and the run's record; default: that of --checkpoint, else checkpoints.",
    )
    checkpoint: str | None = Field(None, description="Resume from this checkpoint_step_<N>.pt.")
    resume: Literal["never", "auto"] = Field("never", description="auto: continue from the newest valid checkpoint in save_dir.")
    explain: bool = Field(False, description="Print parameters, memory, tokens and expected time instead of training.")


def print_explanation(options: TrainOptions) -> None:
    """Prints size, memory, tokens and time of the run, on rank 0."""
    data_dir = Path(options.data_dir)
    manifest = load_manifest(data_dir, options.dataset_id, options.snapshot_id)
    given, plan = options.stage(TrainConfig), None
    if given.train_minutes is not None:  # all ranks measure together
        with join_ranks(given) as ranks, StopRequest() as stop:
            require_same_options(given, manifest, ranks)
            folder = _save_dir(options)
            given, plan = planned(given, data_dir, manifest, folder, ranks, stop, checkpoint=options.checkpoint, restarts=True)
    config = resolve(given, manifest)
    ranks = Ranks.alone(config.device, config.threads_per_process, int(os.environ.get("WORLD_SIZE", 1)))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.set_num_threads(ranks.threads)
        data = TrainingData.open(data_dir, manifest, config, starting_parent(config.init_from, None))
        for name, value in ((plan.describe() if plan is not None else {}) | explain(config, data, ranks)).items():
            print(f"{name:<22} {value}")


def _save_dir(options: TrainOptions) -> Path:
    """`--save_dir`; by default, a run that is resumed stays in its folder."""
    if options.save_dir is not None:
        return Path(options.save_dir)
    if options.checkpoint is not None:
        named = Path(options.checkpoint)
        folder = named if named.is_dir() else named.parent
        if folder.is_dir():
            return folder
    return Path("checkpoints")


def _prog() -> str:
    """The name of the tool in its messages, with the rank if there are several: all of them may report the same error."""
    return f"[rank {os.environ['RANK']}] {PROG}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else PROG


def main(callback: Callback | None = None) -> None:
    restrict_umask()
    raise_on_interrupt()
    prog = _prog()
    options = parse_options(TrainOptions, prog)
    try:
        if options.explain:
            print_explanation(options)
            return
        train(
            options.stage(TrainConfig),
            Path(options.data_dir),
            _save_dir(options),
            dataset_id=options.dataset_id,
            snapshot_id=options.snapshot_id,
            checkpoint=options.checkpoint,
            resume=options.resume,
            callback=callback,
        )
    except TextmillError as error:
        # All ranks stop together on request: one message per machine is enough.
        if not isinstance(error, Preempted) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(error_message(error, prog), file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:  # before the first step or after the last one: `StopRequest` handles it while training
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            saved = "everything up to the last checkpoint is saved; --resume auto continues from it, if there is one"
            print(f"\n{prog}: stopped; {saved}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from None


if __name__ == "__main__":
    run_rank(main)
