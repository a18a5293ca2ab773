"""checkpoint: a model trained by torchrun."""

from typing import Any

import dagster as dg
from pydantic import Field

from llm_core.checkpoint_files import CheckpointRecord
from llm_core.config import TrainConfig
from llm_core.files import read_json
from llm_core.identity import run_id
from llm_core.parent import find_parent
from llm_core.runlog import read_metrics
from llm_core.shards import DatasetManifest
from pipeline import checks
from pipeline.assets.common import HOOKS, MODEL, OWNERS, rounded, table
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.current import set_current
from pipeline.handover import Upstream
from pipeline.plots import loss_curve, picture
from pipeline.release import released_checkpoint, released_model
from pipeline.resources import CatalogResource, Storage, Torchrun
from pipeline.training import finished_checkpoint, run_training

RELEASED = "released"


class CheckpointConfig(TrainConfig, dg.Config):
    """Shape of the model, everything that decides its training, and how many processes share it."""

    init_from: str | None = Field(
        None,
        description="Start from the weights of this checkpoint or run folder, with a new warm-up and optimizer; 'released': from "
        "the released model, or from nothing where there is none yet.",
    )
    nproc_per_node: int = Field(1, ge=1, le=64, description="Training processes on this machine: one per GPU, 1 or 2 on a CPU.")


@dg.asset(
    deps=[tokenized_shards],
    kinds={"pytorch", "torchrun"},
    group_name=MODEL,
    owners=OWNERS,
    hooks=HOOKS,
    pool="device",
    check_specs=checks.CHECKPOINT,
)
def checkpoint(
    context: dg.AssetExecutionContext, config: CheckpointConfig, storage: Storage, catalog: CatalogResource, torchrun: Torchrun
) -> dg.MaterializeResult:
    """A decoder language model trained with DDP under torchrun, with its checkpoints, metrics and complete configuration.

    The same data and configuration are the same run: a finished one is reused, an interrupted one goes on where it stopped.
    """
    manifest = Upstream(context, storage).dataset()
    train_config, start = config.part(TrainConfig), config.init_from or "nothing"
    if config.init_from == RELEASED:
        released = released_checkpoint(storage, manifest.tokenizer.tokenizer_id)
        if released is not None and _has_made(train_config, manifest, released):
            context.log.info("the released model was trained like this on this very text: nothing to train")
            return _result(storage, released, manifest, reused=True, start=RELEASED)
        if released is not None:
            train_config = train_config.model_copy(update={"init_from": str(released.path.parent)})
        else:
            # Without a release there is nothing to replay either.
            train_config = train_config.model_copy(update={"init_from": None, "replay_share": None})
            model = released_model(storage)
            start = f"nothing: {_why_not_released(model, manifest)}"
            # Before the first release there is nothing else that could be meant.
            (context.log.info if model is None else context.log.warning)(f"init_from {RELEASED}: training starts from {start}")
    parent = find_parent(train_config.init_from) if train_config.init_from is not None else None
    resolved = train_config.resolved(manifest.max_length, manifest.stride)
    run = run_id(manifest, resolved, parent.checkpoint_id if parent is not None else None)
    run_dir = storage.checkpoints / run
    record = finished_checkpoint(run_dir)
    reused = record is not None
    if record is None:
        try:
            record = run_training(
                context,
                torchrun,
                resolved,  # its windows are those of this dataset, whichever is the current one by now
                config.nproc_per_node,
                storage.processed,
                manifest,
                run_dir,
                # Not for long, if others hold the catalog: the progress is to be told as well.
                record=lambda: catalog.open(storage, at_most=5).record_run(run_dir),
            )
        except BaseException:
            try:
                catalog.open(storage).record_run(run_dir)  # a failed run is remembered too
            except Exception as error:  # and what it failed of is what is to be told
                context.log.warning(f"the run that failed is not in the catalog: {error}")
            raise
    else:
        context.log.info(f"run {run} is finished already: nothing to train")
    catalog.open(storage).record_run(run_dir)
    return _result(storage, record, manifest, reused, start)


def _has_made(config: TrainConfig, manifest: DatasetManifest, released: CheckpointRecord) -> bool:
    """Whether the released model is what this configuration makes of this text, from where its own run began."""
    began_with = read_json(released.path.parent / "run.json")["parent_checkpoint_id"]
    if began_with is None:  # so that there was nothing to replay
        config = config.model_copy(update={"replay_share": None})
    return released.run_id == run_id(manifest, config.resolved(manifest.max_length, manifest.stride), began_with)


def _why_not_released(model: dict[str, Any] | None, manifest: DatasetManifest) -> str:
    """Why training cannot start from the released model; model: its textmill.json."""
    if model is None:
        return "no model is released yet"
    if model["tokenizer_id"] != manifest.tokenizer.tokenizer_id:
        return (
            f"the released model {model['model_id']} has the tokenizer {model['tokenizer_id']}, the dataset "
            f"{manifest.tokenizer.tokenizer_id}"
        )
    return (
        f"the checkpoint of the released model {model['model_id']}, {model['checkpoint_file']} of run {model['run_id']}, is gone"
    )


def _result(
    storage: Storage, record: CheckpointRecord, manifest: DatasetManifest, reused: bool, start: str
) -> dg.MaterializeResult:
    """Tells what a checkpoint is, and makes it the current one if it is sound; start: what `init_from` came to."""
    run_dir = record.path.parent
    state, metrics = read_json(run_dir / "run.json"), read_metrics(run_dir / "metrics.jsonl")
    last = {line["kind"]: line for line in metrics}
    check_results = checks.checkpoint(state, metrics, manifest.tokenizer.vocab_size)
    if checks.may_go_on(check_results):
        set_current(storage.current_checkpoint, record.path)
    return dg.MaterializeResult(
        data_version=dg.DataVersion(record.checkpoint_id),
        check_results=check_results,
        metadata={
            "run_id": record.run_id,
            "loss_curve": picture(run_dir / f"loss_curve_step_{record.step}.png", "loss curve", lambda: loss_curve(metrics)),
            "training_loss": rounded(last["train"]["loss"]),
            "validation_loss": rounded(last["eval"]["val_loss"]),
            "validation_bits_per_byte": rounded(last["eval"]["val_bits_per_byte"]),
            "steps": record.step,
            "tokens_seen": record.tokens_seen,
            "tokens_per_second": rounded(last["train"]["tokens_per_second"], 0),
            "mfu": rounded(last["train"].get("mfu")),  # runs of older versions have none
            "parameters": state["parameters"],
            "reused": reused,
            "time_by_phase": table(
                [{"phase": phase, "seconds": round(part, 2)} for phase, part in state["seconds_by_phase"].items()],
                phase="string",
                seconds="float",
            ),
            "skipped_steps": state["skipped_steps"],
            "processes": state["world_size"],
            "device": state["device"],
            "precision": state["precision"],
            "attention": state["attention"],
            "mixture": table(state["mixture"], part="string", windows="int", windows_read="int", share="float", epochs="float"),
            "started_from": start,
            "parent_run_id": state["parent_run_id"] or "none: trained from the start",
            "dataset_id": manifest.dataset_id,
            "snapshot_id": manifest.snapshot_id,
            "checkpoint_id": record.checkpoint_id,
            "file": dg.MetadataValue.path(record.path),
            "run": dg.MetadataValue.json(state),
        },
    )
