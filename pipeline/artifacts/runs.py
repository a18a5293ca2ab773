"""Training runs: a finished one is reused, an interrupted one is resumed, a new one is trained."""

from pathlib import Path

from llm_core.artifact_ids import run_id
from llm_core.checkpoint import CheckpointRecord, starting_parent
from llm_core.config import TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.training import resolve
from pipeline.artifacts.plans import with_plan
from pipeline.artifacts.step import Step
from pipeline.processes.training import finished_checkpoint, run_training
from pipeline.resources import Torchrun


def find_or_train(
    step: Step, torchrun: Torchrun, config: TrainConfig, nproc_per_node: int, manifest: DatasetManifest
) -> tuple[CheckpointRecord, bool]:
    """The last checkpoint of a training run on a dataset, and whether it existed before.

    Raises:
        dagster.Failure: the training ended early; the description says why.
        UserError: the options do not fit the dataset.
    """
    if config.init_from is not None and (init_from := Path(config.init_from)).exists():
        folder = (init_from if init_from.is_dir() else init_from.parent).resolve()
        if folder.is_relative_to(step.home.checkpoints):  # no other is collected, and it may be read-only
            step.storage.use(folder)
    parent = starting_parent(config.init_from, resumed_from=None)
    parent_checkpoint_id = parent.checkpoint_id if parent is not None else None
    config = with_plan(step, torchrun, config, nproc_per_node, manifest, parent_checkpoint_id)
    resolved = resolve(config, manifest)
    run = run_id(manifest, resolved, parent_checkpoint_id)
    run_dir = step.home.run(run).root
    step.storage.use(run_dir)
    record = finished_checkpoint(run_dir)
    if record is not None:
        step.log.info(f"run {run} is finished already: nothing to train")
        step.catalog().record_run(run_dir)
        return record, True
    try:
        record = run_training(
            step.context,
            torchrun,
            resolved,  # the current dataset may be another one by now
            nproc_per_node,
            step.data_dir,
            manifest,
            run_dir,
            # A short wait: progress must be reported even while others hold the catalog.
            record=lambda: step.catalog(at_most=5).record_run(run_dir),
        )
    except BaseException:
        try:
            step.catalog().record_run(run_dir)  # a failed run is recorded too
        except Exception as error:  # must not hide why the run failed
            step.log.warning(f"the failed run is not in the catalog: {error}")
        raise
    step.catalog().record_run(run_dir)
    return record, False
