"""The training tool: `python -m llm_core.train ...`, or the same under torchrun for several processes and machines."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a plain file: find the package, not its modules

from llm_core import processes  # noqa: F401  who started this process is asked before PyTorch takes its time to load

# Read when PyTorch loads OpenMP: a thread that waits for the others sleeps instead of spinning. On a machine that is busy with
# something else too, spinning threads keep each other off the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pydantic import Field
from torch.distributed.elastic.multiprocessing.errors import record

from llm_core.checkpoint import TrainingState, load_checkpoint
from llm_core.cli import error_message, parse_options
from llm_core.config import TrainConfig
from llm_core.distributed import Ranks, StopRequest, join_ranks, run_rank
from llm_core.errors import Preempted, TextmillError
from llm_core.explain import explain
from llm_core.files import keep_others_from_writing, read_json, write_json
from llm_core.loop import TrainingLoop
from llm_core.parent import Parent, find_parent, recorded_parent
from llm_core.resume import find_resume_state, make_room
from llm_core.runlog import Listener, RunLog, now
from llm_core.shards import load_manifest
from llm_core.trainer import Trainer
from llm_core.training_data import TrainingData
from llm_core.version import code_version, git_commit

PROG = "python -m llm_core.train"

_FIRST_RANK_SPEAKS = 3.0
"""Seconds in which torchrun notices for certain that a rank has ended."""


class TrainOptions(TrainConfig):
    """Train a decoder language model on prepared data."""

    data_dir: str = Field("processed_data", description="Folder written by the data preparation.")
    dataset_id: str | None = Field(None, description="Train on this version of the dataset, of manifests/; default: the current.")
    snapshot_id: str | None = Field(
        None, description="With dataset_id: the snapshot that tells the source of its documents; default: the one it was made of."
    )
    save_dir: str | None = Field(
        None,
        description="Folder for checkpoints, metrics and the run's state; default: that of --checkpoint, else checkpoints.",
    )
    checkpoint: str | None = Field(None, description="Resume from this checkpoint_step_<N>.pt.")
    resume: Literal["never", "auto"] = Field(
        "never", description="auto: continue from the newest checkpoint in save_dir that verifies."
    )
    explain: bool = Field(False, description="Print parameters, memory, tokens and the expected time, and do not train.")


def train(
    config: TrainConfig,
    data_dir: Path,
    run_dir: Path,
    *,
    dataset_id: str | None = None,
    snapshot_id: str | None = None,
    checkpoint: str | None = None,
    resume: Literal["never", "auto"] = "never",
    listener: Listener | None = None,
) -> None:
    """Trains in this process, as one of the ranks that torchrun started or alone.

    Raises:
        Preempted: the run was asked to stop; its state is saved and `resume="auto"` goes on.
        TextmillError: options, data or checkpoints do not fit; the message says what to do.
    """
    manifest = load_manifest(data_dir, dataset_id, snapshot_id)
    config = config.resolved(manifest.max_length, manifest.stride)
    with join_ranks(config, run_dir) as ranks, StopRequest() as stop, _run_log(run_dir, ranks, listener) as log:
        # The snapshot says which source a document belongs to: the same documents can lie in other folders.
        data = {"dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id if config.source_weights else None}
        ranks.require_same(config.model_dump(exclude={"threads_per_process"}) | data | {"code_version": code_version()})
        found = ranks.from_main(lambda: find_resume_state(run_dir, checkpoint, resume))
        parent = ranks.from_main(lambda: _parent(config.init_from, found))
        trainer = Trainer(config, TrainingData.open(data_dir, manifest, config, parent), ranks, stop)
        if found is not None:
            trainer.restore(*found)
        elif parent is not None and (path := parent.path) is not None:
            trainer.start_from(path, ranks.from_main(lambda: load_checkpoint(path)))
        if ranks.from_main(lambda: _is_finished(run_dir, trainer)):
            if log is not None:
                log.say(f"run {trainer.run_id} has finished, all {config.max_steps} steps of it: nothing left to do")
            return
        set_aside = ranks.from_main(lambda: make_room(run_dir, trainer.run_id, trainer.step))
        resumed = (found[0], found[1]["precision"]) if found is not None else None
        found = None  # as large as the model and its optimizer
        if log is not None:
            usage = trainer.data.write_usage(run_dir, data_dir, config)
            _announce(log, trainer, usage, resumed, set_aside)
        finished = TrainingLoop(trainer, run_dir, log).run()
        if log is not None:
            seconds = trainer.phases.seconds
            log.update({"status": "finished" if finished else "preempted", "finished_at": now(), "seconds_by_phase": seconds})
            shares = sorted(seconds.items(), key=lambda item: -item[1])
            log.say("time: " + ", ".join(f"{phase} {part / sum(seconds.values()):.0%}" for phase, part in shares))
    if not finished:
        raise Preempted(
            f"stopped on request at step {trainer.step}/{config.max_steps}; saved in {run_dir}, --resume auto goes on"
        )


def _parent(init_from: str | None, resumed: tuple[Path, TrainingState] | None) -> Parent | None:
    """What the weights come from; a run that goes on asks its own files, since the parent's may have changed meanwhile."""
    if init_from is None:
        return None
    recorded = recorded_parent(resumed[0]) if resumed is not None else None
    return recorded or find_parent(init_from)


def _is_finished(run_dir: Path, trainer: Trainer) -> bool:
    """Whether the state that was loaded is a run's last one, and the run's own files say that it ended well."""
    if trainer.step < trainer.config.max_steps or not (run_dir / "run.json").is_file():
        return False
    state = read_json(run_dir / "run.json")
    return bool(state["run_id"] == trainer.run_id and state["status"] == "finished")


@contextmanager
def _run_log(run_dir: Path, ranks: Ranks, listener: Listener | None) -> Iterator[RunLog | None]:
    """The run's log on the main rank, None elsewhere; an error that ends the run is written into its state."""
    if not ranks.is_main:
        yield None
        return
    log = RunLog(run_dir, listener)
    try:
        yield log
    except Exception as error:
        log.fail(error)
        raise
    finally:
        log.close()


def _announce(
    log: RunLog,
    trainer: Trainer,
    usage: dict[str, str | None],
    resumed: tuple[Path, str] | None,
    set_aside: list[Path],
) -> None:
    """Writes what this run is, to its files and to the console; resumed: the checkpoint it goes on from, and its precision."""
    config, model, ranks, data = trainer.config, trainer.model, trainer.ranks, trainer.data
    mixture = data.mixture(config)
    write_json(log.run_dir / "config.json", config.model_dump(mode="json"))
    accumulation = config.batch_size // (trainer.micro_batch_size * ranks.world_size)
    log.begin(
        {
            "format_version": 1,
            "run_id": trainer.run_id,
            "dataset_id": data.manifest.dataset_id,
            "snapshot_id": data.manifest.snapshot_id,
            "tokenizer_id": data.tokenizer.tokenizer_id,
            "parent_run_id": data.parent.run_id if data.parent is not None else None,
            "parent_step": data.parent.step if data.parent is not None else None,
            "parent_checkpoint_id": data.parent_checkpoint_id,
            "mixture": mixture,
            **usage,
            "config": config.model_dump(mode="json"),
            "seed": config.seed,
            "code_version": code_version(),
            "git_commit": git_commit(),
            "status": "running",
            "started_at": _first_start(log.run_dir, trainer.run_id),
            "finished_at": None,
            "error": None,
            "resumed_from_step": trainer.step,
            "steps_done": trainer.step,
            "tokens_seen": trainer.tokens_seen,
            "skipped_steps": trainer.skipped_steps,
            "parameters": model.config.num_parameters,
            "flops_per_token": model.flops_per_token(),
            "world_size": ranks.world_size,
            "threads": ranks.threads,
            "device": str(ranks.device),
            "precision": trainer.precision,
            "attention": model.backend,
            "micro_batch_size": trainer.micro_batch_size,
            "accumulation_steps": accumulation,
            "torch_version": torch.__version__,
        },
        step=trainer.step,
    )
    windows = len(data.train)
    epochs = config.max_steps * config.batch_size / windows
    log.say(
        f"run {trainer.run_id}: {model.config.num_parameters:,} parameters, {windows:,} windows of {config.max_length} tokens, "
        f"{config.max_steps} steps of {config.batch_size} windows ({epochs:.2f} epochs)\n"
        f"{ranks.world_size} rank(s) on {ranks.device.type} with {ranks.threads} thread(s), {trainer.precision}, "
        f"attention {model.backend}, micro batch {trainer.micro_batch_size} x {accumulation}"
    )
    if config.sharding == "fsdp" and ranks.world_size == 1:
        log.say("--sharding fsdp: one rank has nobody to share the model with")
    if data.parent is not None:
        log.say(f"weights from step {data.parent.step} of run {data.parent.run_id}")
    if data.parts is not None:
        for part in mixture:
            log.say(f"{part['share']:7.1%} {part['part']}: {part['windows']:,} windows, {part['epochs']:.2f} epochs")
    if resumed is not None:
        path, precision = resumed
        log.say(f"resumed from {path} at step {trainer.step}")
        if precision != trainer.precision:
            log.say(f"{path}: saved in {precision}, goes on in {trainer.precision}: the losses will not be the same")
    for path in set_aside:
        log.say(f"set aside, being of a later step: {path}")


def _first_start(run_dir: Path, run_id: str) -> str:
    """When the run began, however often it was resumed since."""
    path = run_dir / "run.json"
    state = read_json(path) if path.exists() else {}
    return state["started_at"] if state.get("run_id") == run_id else now()


def print_explanation(options: TrainOptions) -> None:
    """Prints what a run of this configuration would be and cost."""
    data_dir = Path(options.data_dir)
    manifest = load_manifest(data_dir, options.dataset_id, options.snapshot_id)
    config = options.part(TrainConfig).resolved(manifest.max_length, manifest.stride)
    ranks = Ranks.alone(config.device, config.threads_per_process, int(os.environ.get("WORLD_SIZE", 1)))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.set_num_threads(ranks.threads)
        data = TrainingData.open(data_dir, manifest, config, _parent(config.init_from, None))
        for name, value in explain(config, data, ranks).items():
            print(f"{name:<22} {value}")


def _save_dir(options: TrainOptions) -> Path:
    """A run goes on where it was, unless it is told otherwise."""
    if options.save_dir is not None:
        return Path(options.save_dir)
    if options.checkpoint is not None:
        named = Path(options.checkpoint)
        folder = named if named.is_dir() else named.parent
        if folder.is_dir():
            return folder
    return Path("checkpoints")


def _options() -> TrainOptions:
    """The command line. All ranks of a machine have the same one: the first of them says what is wrong with it."""
    if not int(os.environ.get("LOCAL_RANK", 0)):
        return parse_options(TrainOptions, PROG)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
            return parse_options(TrainOptions, PROG)
    except SystemExit:
        time.sleep(_FIRST_RANK_SPEAKS)  # torchrun ends all ranks when one has ended
        raise


@record
def main(listener: Listener | None = None) -> None:
    keep_others_from_writing()
    options = _options()
    try:
        if options.explain:
            print_explanation(options)
            return
        train(
            options.part(TrainConfig),
            Path(options.data_dir),
            _save_dir(options),
            dataset_id=options.dataset_id,
            snapshot_id=options.snapshot_id,
            checkpoint=options.checkpoint,
            resume=options.resume,
            listener=listener,
        )
    except TextmillError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):
            if isinstance(error, Preempted):  # all ranks are, always
                raise SystemExit(error.exit_code) from None
            # One message per machine is enough, but an error may be this rank's alone. Where the first rank has it too, torchrun
            # ends the others before they speak.
            time.sleep(_FIRST_RANK_SPEAKS)
        print(error_message(error, PROG), file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    run_rank(main)
