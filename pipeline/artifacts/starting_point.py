"""Where a training starts: `init_from: released` becomes a checkpoint, or nothing."""

from dataclasses import dataclass

from llm_core.artifact_ids import run_id
from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.config import TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.huggingface import ModelRecord
from llm_core.training import resolve
from pipeline.artifacts.plans import known_plan
from pipeline.artifacts.release import released_checkpoint, released_model
from pipeline.artifacts.step import Step

RELEASED = "released"


@dataclass(frozen=True)
class StartingPoint:
    """What a configured `init_from` means now."""

    config: TrainConfig  # with the path of a checkpoint in place of "released"
    description: str
    finished: CheckpointRecord | None = None  # the released model, if this training would only repeat its own


def starting_point(step: Step, config: TrainConfig, nproc_per_node: int, manifest: DatasetManifest) -> StartingPoint:
    """Resolves `init_from` of a training on a dataset."""
    if config.init_from != RELEASED:
        return StartingPoint(config, config.init_from or "nothing")
    checkpoint = released_checkpoint(step.storage, manifest.tokenizer.tokenizer_id)
    if checkpoint is None:
        model = released_model(step.storage)
        description = f"nothing: {_why_not_released(model, manifest)}"
        # Before the first release this is expected.
        (step.log.info if model is None else step.log.warning)(f"init_from {RELEASED}: training starts from {description}")
        # Without a parent there is nothing to replay.
        return StartingPoint(config.model_copy(update={"init_from": None, "replay_share": None}), description)
    if _repeats(step, config, nproc_per_node, manifest, checkpoint):
        step.log.info("the released model was trained with this configuration on this text: nothing to train")
        return StartingPoint(config, RELEASED, finished=checkpoint)
    return StartingPoint(config.model_copy(update={"init_from": str(checkpoint.path.parent)}), RELEASED)


def _repeats(step: Step, config: TrainConfig, nproc_per_node: int, manifest: DatasetManifest, released: CheckpointRecord) -> bool:
    """Whether the released model is the result of this configuration on this text, started where its own run started."""
    parent_checkpoint_id = RunRecord.read(released.path.parent).parent_checkpoint_id
    if parent_checkpoint_id is None:  # then nothing was replayed
        config = config.model_copy(update={"replay_share": None})
    if config.train_minutes is not None:
        plan = known_plan(step, config, nproc_per_node, manifest, parent_checkpoint_id)
        if plan is None:
            return False
        config = plan.applied(config)
    return released.run_id == run_id(manifest, resolve(config, manifest), parent_checkpoint_id)


def _why_not_released(model: ModelRecord | None, manifest: DatasetManifest) -> str:
    """Why training cannot start from the released model."""
    if model is None:
        return "no model is released yet"
    if model.tokenizer_id != manifest.tokenizer.tokenizer_id:
        return (
            f"the released model {model.model_id} has the tokenizer {model.tokenizer_id}, the dataset "
            f"{manifest.tokenizer.tokenizer_id}"
        )
    return f"the checkpoint of the released model {model.model_id}, {model.checkpoint_file} of run {model.run_id}, is gone"
