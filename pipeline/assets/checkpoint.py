"""checkpoint: a model trained by torchrun."""

import dagster as dg
from pydantic import Field

from llm_core.config import TrainConfig
from llm_core.files import read_json
from llm_core.identity import run_id
from llm_core.runlog import read_metrics
from llm_core.shards import load_manifest
from pipeline.assets.common import MODEL, OWNERS, rounded
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.current import set_current
from pipeline.plots import loss_curve
from pipeline.resources import CatalogResource, Storage, Torchrun
from pipeline.training import finished_checkpoint, run_training


class CheckpointConfig(TrainConfig, dg.Config):
    """Shape of the model, everything that decides its training, and how many processes share it."""

    nproc_per_node: int = Field(1, ge=1, le=64, description="Training processes on this machine: one per GPU, 1 or 2 on a CPU.")


@dg.asset(deps=[tokenized_shards], kinds={"pytorch", "torchrun"}, group_name=MODEL, owners=OWNERS)
def checkpoint(
    context: dg.AssetExecutionContext, config: CheckpointConfig, storage: Storage, catalog: CatalogResource, torchrun: Torchrun
) -> dg.MaterializeResult:
    """A decoder language model trained with DDP under torchrun, with its checkpoints, metrics and complete configuration.

    The same data and configuration are the same run: a finished one is reused, an interrupted one goes on where it stopped.
    """
    train_config = config.part(TrainConfig)
    manifest = load_manifest(storage.processed)
    run = run_id(
        manifest.dataset_id, manifest.tokenizer.tokenizer_id, train_config.resolved(manifest.max_length, manifest.stride)
    )
    run_dir = storage.checkpoints / run
    record = finished_checkpoint(run_dir)
    reused = record is not None
    if record is None:
        try:
            record = run_training(context, torchrun, train_config, config.nproc_per_node, storage.processed, run_dir)
        finally:
            catalog.open().record_run(run_dir)  # a failed run is remembered too
    else:
        context.log.info(f"run {run} is finished already: nothing to train")
        catalog.open().record_run(run_dir)
    set_current(storage.current_checkpoint, record.path)

    state, metrics = read_json(run_dir / "run.json"), read_metrics(run_dir / "metrics.jsonl")
    last = {line["kind"]: line for line in metrics}
    return dg.MaterializeResult(
        data_version=dg.DataVersion(record.checkpoint_id),
        metadata={
            "run_id": run,
            "loss_curve": loss_curve(metrics),
            "training_loss": rounded(last["train"]["loss"]),
            "validation_loss": rounded(last["eval"]["val_loss"]),
            "validation_bits_per_byte": rounded(last["eval"]["val_bits_per_byte"]),
            "steps": record.step,
            "tokens_seen": record.tokens_seen,
            "tokens_per_second": rounded(last["train"]["tokens_per_second"], 0),
            "parameters": state["parameters"],
            "reused": reused,
            "skipped_steps": state["skipped_steps"],
            "processes": state["world_size"],
            "device": state["device"],
            "precision": state["precision"],
            "attention": state["attention"],
            "dataset_id": manifest.dataset_id,
            "checkpoint_id": record.checkpoint_id,
            "file": dg.MetadataValue.path(record.path),
            "run": dg.MetadataValue.json(state),
        },
    )
