"""Plans of runs with `train_minutes`: made by a short measurement, then kept, so that a rerun finds its run."""

from llm_core.config import TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.errors import UserError
from llm_core.layout import RunFolder
from llm_core.system import content_id, held
from llm_core.training import Plan, find_plan, machine, request_id
from pipeline.artifacts.step import Step
from pipeline.processes.training import run_planning
from pipeline.resources import Torchrun


def known_plan(
    step: Step, config: TrainConfig, nproc_per_node: int, manifest: DatasetManifest, parent_checkpoint_id: str | None
) -> Plan | None:
    """The plan of these options on this dataset and machine, if there is one."""
    request = request_id(config, manifest, parent_checkpoint_id)
    folder = _folder(step, config, nproc_per_node, request)
    return find_plan(folder.root, request, machine(config, nproc_per_node, nproc_per_node))


def with_plan(
    step: Step,
    torchrun: Torchrun,
    config: TrainConfig,
    nproc_per_node: int,
    manifest: DatasetManifest,
    parent_checkpoint_id: str | None,
) -> TrainConfig:
    """The configuration with a plan in place of `train_minutes`; without that option it is returned as it is.

    Raises:
        dagster.Failure: the measurement failed; the description says why.
        UserError: the plan is for another device than the one that this process sees.
    """
    if config.train_minutes is None:
        return config
    folder = _folder(step, config, nproc_per_node, request_id(config, manifest, parent_checkpoint_id)).root
    # Another run with the same options and text measures the same thing: this one waits for its plan.
    with held(
        folder, lambda pid: step.log.info(f"process {pid} is measuring this machine for the same training: waiting for it")
    ):
        plan = known_plan(step, config, nproc_per_node, manifest, parent_checkpoint_id)
        if plan is None:
            run_planning(step.context, torchrun, config, nproc_per_node, step.data_dir, manifest, folder)
            plan = known_plan(step, config, nproc_per_node, manifest, parent_checkpoint_id)
    if plan is None:
        raise UserError(
            f"train_minutes {config.train_minutes:g}: this process and the training see different devices ({folder}); "
            "set device: cpu or cuda"
        )
    (step.log.info if plan.enough_text else step.log.warning)(str(plan))
    return plan.applied(config)


def _folder(step: Step, config: TrainConfig, nproc_per_node: int, request: str) -> RunFolder:
    return step.home.plan(content_id("plan", request, machine(config, nproc_per_node, nproc_per_node)))
