"""checkpoint: a model trained by torchrun."""

import dagster as dg
from pydantic import Field

from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.config import TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.layout import RunFolder
from llm_core.training import read_metrics
from pipeline.artifacts.pointers import set_current
from pipeline.artifacts.runs import find_or_train
from pipeline.artifacts.starting_point import starting_point
from pipeline.artifacts.step import Step
from pipeline.artifacts.upstream import Upstream
from pipeline.assets.checks import CHECKPOINT_CHECKS, check_checkpoint, may_continue, warned
from pipeline.assets.common import HOOKS, MODEL, OWNERS
from pipeline.assets.plots import picture, plot_loss_curve
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.failures import one_line_errors
from pipeline.presentation import rounded, table
from pipeline.resources import CatalogResource, Storage, Torchrun


class CheckpointConfig(TrainConfig, dg.Config):
    """Shape of the model, its training, and the number of training processes."""

    init_from: str | None = Field(
        None,
        description="Start from the weights of this checkpoint or run folder, with a new warm-up and optimizer; 'released': from "
        "the released model, or from nothing if there is none yet.",
    )
    nproc_per_node: int = Field(1, ge=1, le=64, description="Training processes on this machine: one per GPU, 1 or 2 on a CPU.")


@dg.asset(
    deps=[tokenized_shards],
    kinds={"pytorch", "torchrun"},
    group_name=MODEL,
    owners=OWNERS,
    hooks=HOOKS,
    pool="device",
    check_specs=CHECKPOINT_CHECKS,
)
@one_line_errors
def checkpoint(
    context: dg.AssetExecutionContext, config: CheckpointConfig, storage: Storage, catalog: CatalogResource, torchrun: Torchrun
) -> dg.MaterializeResult:
    """A decoder language model trained under torchrun, with its checkpoints, metrics and complete configuration.

    The same data and configuration give the same run: a finished one is reused, an interrupted one is resumed.
    """
    step = Step(context, storage, catalog)
    manifest = Upstream(step).dataset()
    start = starting_point(step, config.stage(TrainConfig), config.nproc_per_node, manifest)
    if start.finished is not None:
        return _result(step, start.finished, manifest, reused=True, start=start.description)
    record, reused = find_or_train(step, torchrun, start.config, config.nproc_per_node, manifest)
    return _result(step, record, manifest, reused, start.description)


def _result(step: Step, record: CheckpointRecord, manifest: DatasetManifest, reused: bool, start: str) -> dg.MaterializeResult:
    """The metadata of a checkpoint, which becomes the current one unless a blocking check failed. start: what it started from."""
    run_dir = record.path.parent
    run, metrics = RunRecord.read(run_dir), read_metrics(RunFolder(run_dir).metrics)
    last = {line["kind"]: line for line in metrics}
    check_results = check_checkpoint(run, metrics, manifest.tokenizer.vocab_size)
    if may_continue(check_results):
        set_current(step.home.current_checkpoint, record.path)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(record.checkpoint_id),
        check_results=warned(step.log, check_results),
        metadata={
            "run_id": record.run_id,
            "loss_curve": picture(RunFolder(run_dir).loss_curve(record.step), "loss curve", lambda: plot_loss_curve(metrics)),
            "training_loss": rounded(last["train"]["loss"]),
            "validation_loss": rounded(last["eval"]["val_loss"]),
            "validation_bits_per_byte": rounded(last["eval"]["val_bits_per_byte"]),
            "steps": record.step,
            "tokens_seen": record.tokens_seen,
            "tokens_per_second": rounded(last["train"]["tokens_per_second"], 0),
            "mfu": rounded(last["train"].get("mfu")),  # missing in runs of older versions
            "parameters": run.parameters,
            "reused": reused,
            "time_by_phase": table(
                [{"phase": phase, "seconds": round(seconds, 2)} for phase, seconds in run.seconds_by_phase.items()],
                phase="string",
                seconds="float",
            ),
            "skipped_steps": run.skipped_steps,
            "processes": run.world_size,
            "device": run.device,
            "precision": run.precision,
            "attention": run.attention,
            "mixture": table(
                [usage.model_dump() for usage in run.mixture],
                group="string",
                windows="int",
                windows_read="int",
                share="float",
                epochs="float",
            ),
            "started_from": start,
            "parent_run_id": run.parent_run_id or "none: trained from the start",
            "dataset_id": manifest.dataset_id,
            "snapshot_id": manifest.snapshot_id,
            "checkpoint_id": record.checkpoint_id,
            "file": dg.MetadataValue.path(record.path),
            "run": dg.MetadataValue.json(run.model_dump(mode="json")),
        },
    )
