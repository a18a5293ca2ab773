"""One training run, from its options to its last checkpoint."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from llm_core.checkpoint import GroupUsage, RunRecord, starting_parent
from llm_core.checkpoint.resume import find_resume_state, set_later_checkpoints_aside
from llm_core.checkpoint.state import TrainingState, load_checkpoint
from llm_core.config import AUTO, ResolvedTrainConfig, TrainConfig
from llm_core.dataset import DatasetManifest, load_manifest
from llm_core.distributed.launch import StopRequest, join_ranks
from llm_core.distributed.ranks import Ranks
from llm_core.errors import Preempted, UserError
from llm_core.layout import RunFolder
from llm_core.system import code_version, cpu_has_bf16, git_commit, now, write_json
from llm_core.training.cost import describe_rates
from llm_core.training.loop import TrainingLoop
from llm_core.training.plan import Plan, resolve
from llm_core.training.planner import planned
from llm_core.training.run_data import TrainingData, validation_windows
from llm_core.training.run_log import Callback, RunLog
from llm_core.training.trainer import Trainer


def train(
    options: TrainConfig,
    data_dir: Path,
    run_dir: Path,
    *,
    dataset_id: str | None = None,
    snapshot_id: str | None = None,
    checkpoint: str | None = None,
    resume: Literal["never", "auto"] = "never",
    callback: Callback | None = None,
) -> None:
    """Trains in this process, which is the only one or one of the ranks that torchrun started.

    callback: receives each metrics line, on rank 0.

    Raises:
        Preempted: the run was asked to stop; its state is saved and `resume="auto"` continues it.
        TextmillError: options, data or checkpoints do not fit; the message names the remedy.
    """
    manifest = load_manifest(data_dir, dataset_id, snapshot_id)
    if options.train_minutes is None:
        resolve(options, manifest)  # reports what does not fit before the ranks meet
    with ExitStack() as stack:
        ranks, stop = stack.enter_context(join_ranks(options)), stack.enter_context(StopRequest())
        require_same_options(options, manifest, ranks)
        options, plan = planned(options, data_dir, manifest, run_dir, ranks, stop, checkpoint=checkpoint)
        config = resolve(options, manifest)
        run_log = stack.enter_context(_run_log(run_dir, ranks, callback))
        saved = ranks.broadcast_from_main(lambda: find_resume_state(run_dir, checkpoint, resume))
        if options.precision == AUTO:
            config = _with_precision(config, saved[1]["train_config"]["precision"] if saved is not None else None, ranks)
        trainer = _make_trainer(config, data_dir, manifest, saved, ranks, stop)
        resumed_from = (saved[0], saved[1]["precision"]) if saved is not None else None
        del saved  # as large as the model and its optimizer
        if ranks.broadcast_from_main(lambda: _is_finished(run_dir, trainer)):
            if run_log is not None:
                run_log.log(f"run {trainer.run_id} has finished all {config.max_steps} steps: nothing left to do")
            return
        moved = ranks.broadcast_from_main(lambda: set_later_checkpoints_aside(run_dir, trainer.run_id, trainer.step))
        if run_log is not None:
            run = _begin(run_log, trainer, data_dir)
            _log_overview(run_log, trainer, run.mixture, plan)
            _log_resume(run_log, trainer, resumed_from, moved)
        finished = TrainingLoop(trainer, run_dir, run_log).run()
        if run_log is not None:
            _end(run_log, trainer, finished)
    if not finished:
        raise Preempted(
            f"stopped on request at step {trainer.step}/{config.max_steps}; saved in {run_dir}, --resume auto continues the run"
        )


@contextmanager
def _run_log(run_dir: Path, ranks: Ranks, callback: Callback | None) -> Iterator[RunLog | None]:
    """The run's log on rank 0, None on the others. An exception marks the run as failed."""
    if not ranks.is_main:
        yield None
        return
    log = RunLog(run_dir, callback)
    try:
        yield log
    except Exception as error:
        log.fail(error)
        raise
    finally:
        log.close()


def require_same_options(options: TrainConfig, manifest: DatasetManifest, ranks: Ranks) -> None:
    """Raises UserError unless all ranks have the same options, data and code."""
    values = options.model_dump(exclude={"threads_per_process"}) | {"dataset_id": manifest.dataset_id}
    values |= {"dataset's max_length": manifest.max_length, "dataset's stride": manifest.stride}
    # Sources come from the snapshot: the same documents may be in other folders on another machine.
    values |= {"snapshot_id": manifest.snapshot_id if options.source_weights else None, "code_version": code_version()}
    ranks.require_same(values)


def _with_precision(config: ResolvedTrainConfig, saved: str | None, ranks: Ranks) -> ResolvedTrainConfig:
    """The precision that auto means: that of the checkpoint which the run is resumed from, or what suits the devices.

    Raises:
        UserError: the devices of the ranks differ, or the GPU cannot be used.
    """
    if saved is not None:
        return config.model_copy(update={"precision": saved})
    ranks.require_same({"precision": config.precision})
    if config.precision == "bf16" and ranks.device.type == "cpu" and not cpu_has_bf16():
        raise UserError(
            "--precision auto: nvidia-smi reports a GPU, but PyTorch cannot use it; mend its driver, or train with --device cpu"
        )
    return config


def _make_trainer(
    config: ResolvedTrainConfig,
    data_dir: Path,
    manifest: DatasetManifest,
    saved: tuple[Path, TrainingState] | None,
    ranks: Ranks,
    stop: StopRequest,
) -> Trainer:
    """A trainer in its saved state, with the weights of its parent, or with initial weights."""
    parent = ranks.broadcast_from_main(lambda: starting_parent(config.init_from, saved[0] if saved is not None else None))
    # The sources of documents, and with them the windows to validate on, may be others on another machine.
    validation = ranks.broadcast_from_main(lambda: validation_windows(data_dir, manifest, config))
    trainer = Trainer(config, TrainingData.open(data_dir, manifest, config, parent, validation), ranks, stop)
    if saved is not None:
        trainer.restore(*saved)
    elif parent is not None and (path := parent.path) is not None:
        trainer.start_from(path, ranks.broadcast_from_main(partial(load_checkpoint, path)))
    return trainer


def _is_finished(run_dir: Path, trainer: Trainer) -> bool:
    """Whether the trainer is at its last step and run.json records that the run finished."""
    if trainer.step < trainer.config.max_steps:
        return False
    run = RunRecord.find(run_dir)
    return run is not None and _continues(run, trainer) and run.status == "finished"


def _begin(run_log: RunLog, trainer: Trainer, data_dir: Path) -> RunRecord:
    """Writes the records of a run that begins or resumes, and returns its run.json."""
    config, ranks, data = trainer.config, trainer.ranks, trainer.data
    usage = data.write_usage(run_log.run_dir, data_dir, config)
    config_sha256 = write_json(RunFolder(run_log.run_dir).config, config.model_dump(mode="json"))
    earlier = RunRecord.find(run_log.run_dir)
    run = RunRecord(
        run_id=trainer.run_id,
        dataset_id=data.manifest.dataset_id,
        snapshot_id=data.manifest.snapshot_id,
        tokenizer_id=data.tokenizer.tokenizer_id,
        parent_run_id=data.parent.run_id if data.parent is not None else None,
        parent_step=data.parent.step if data.parent is not None else None,
        parent_checkpoint_id=data.parent_checkpoint_id,
        mixture=data.mixture(config),
        document_steps_sha256=usage["document_steps_sha256"],
        known_documents_sha256=usage["known_documents_sha256"],
        config_sha256=config_sha256,
        seed=config.seed,
        code_version=code_version(),
        git_commit=git_commit(),
        status="running",
        started_at=earlier.started_at if earlier is not None and _continues(earlier, trainer) else now(),
        finished_at=None,
        error=None,
        resumed_from_step=trainer.step,
        steps_done=trainer.step,
        tokens_seen=trainer.tokens_seen,
        skipped_steps=trainer.skipped_steps,
        parameters=trainer.model.config.num_parameters,
        flops_per_token=trainer.model.flops_per_token(),
        world_size=ranks.world_size,
        threads=ranks.threads,
        device=str(ranks.device),
        precision=trainer.precision,
        attention=trainer.model.backend,
        micro_batch_size=trainer.micro_batch_size,
        accumulation_steps=trainer.accumulation_steps,
        torch_version=torch.__version__,
    )
    run_log.begin(run, step=trainer.step)
    return run


def _continues(earlier: RunRecord, trainer: Trainer) -> bool:
    """Whether the record in the folder is of this run, and not of one that was removed and is trained again."""
    return earlier.run_id == trainer.run_id and earlier.removed_at is None


def _log_overview(run_log: RunLog, trainer: Trainer, mixture: list[GroupUsage], plan: Plan | None) -> None:
    """Logs the size of the run, its ranks, and where its weights and windows come from."""
    if plan is not None:
        run_log.log(str(plan))
    config, ranks, data = trainer.config, trainer.ranks, trainer.data
    windows = len(data.train)
    epochs = config.max_steps * config.batch_size / windows
    run_log.log(
        f"run {trainer.run_id}: {trainer.model.config.num_parameters:,} parameters, {windows:,} windows of {config.max_length} "
        f"tokens, {config.max_steps} steps of {config.batch_size} windows ({epochs:.2f} epochs)\n"
        f"{ranks.world_size} rank(s) on {ranks.device.type} with {ranks.threads} thread(s), {trainer.precision}, "
        f"attention {trainer.model.backend}, micro batch {trainer.micro_batch_size} x {trainer.accumulation_steps}\n"
        f"{describe_rates(config)}"
    )
    if config.sharding == "fsdp" and ranks.world_size == 1:
        run_log.log("--sharding fsdp: has no effect with one rank")
    if data.parent is not None:
        run_log.log(f"weights from step {data.parent.step} of run {data.parent.run_id}")
    if data.groups is not None:
        for usage in mixture:
            run_log.log(f"{usage.share:7.1%} {usage.group}: {usage.windows:,} windows, {usage.epochs:.2f} epochs")


def _log_resume(run_log: RunLog, trainer: Trainer, resumed_from: tuple[Path, str] | None, moved: list[Path]) -> None:
    """resumed_from: the checkpoint and the precision it was saved in. moved: later checkpoints."""
    if resumed_from is not None:
        checkpoint, saved_precision = resumed_from
        run_log.log(f"resumed from {checkpoint} at step {trainer.step}")
        if saved_precision != trainer.precision:
            run_log.log(f"{checkpoint}: saved in {saved_precision}, continues in {trainer.precision}: losses will differ")
    for path in moved:
        run_log.log(f"moved a later checkpoint out of the way: {path}")


def _end(run_log: RunLog, trainer: Trainer, finished: bool) -> None:
    seconds = trainer.phases.seconds
    run_log.update(status="finished" if finished else "preempted", finished_at=now(), seconds_by_phase=dict(seconds))
    total = sum(seconds.values())
    by_time = sorted(seconds.items(), key=lambda item: -item[1])
    run_log.log("time: " + ", ".join(f"{phase} {spent / total:.0%}" for phase, spent in by_time))
