"""The runs that Dagster knows of: whether one trains, and what the last one failed of."""

import dagster as dg
from dagster._core.definitions.assets.job.asset_job import IMPLICIT_ASSET_JOB_NAME
from pydantic import ValidationError

from llm_core.errors import UserError
from pipeline.assets.checkpoint import checkpoint
from pipeline.automation import pretrain, quickstart
from pipeline.new_text import configured_storage
from pipeline.resources import Storage

# "Materialize" in the asset graph launches a job of Dagster's own, with the assets that were chosen there.
_TRAIN = {pretrain.name, quickstart.name, IMPLICIT_ASSET_JOB_NAME}
_IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_LOOKED_BACK = 50
"""Newest runs among which the last training is sought."""
_MOST_CHARACTERS = 500


def trains(run: dg.DagsterRun) -> bool:
    """Whether the asset `checkpoint` is among what the run makes."""
    return run.job_name in _TRAIN and (run.asset_selection is None or checkpoint.key in run.asset_selection)


def training_in_progress(instance: dg.DagsterInstance) -> str | None:
    """Names a run that trains or will, None if there is none."""
    found = [run for run in instance.get_runs(filters=dg.RunsFilter(statuses=_IN_PROGRESS)) if trains(run)]
    return f"waiting for run {found[0].run_id} of {found[0].job_name} to end" if found else None


def last_failure(instance: dg.DagsterInstance, storage: Storage) -> str | None:
    """What the last training for this home and release line failed of; None if it did not fail, or Dagster knows of none."""
    for run in instance.get_runs(limit=_LOOKED_BACK):
        if trains(run) and _is_for(storage, run):
            if run.status == dg.DagsterRunStatus.CANCELED:
                return f"run {run.run_id} was cancelled"
            return f"run {run.run_id} failed{_reason(instance, run)}" if run.status == dg.DagsterRunStatus.FAILURE else None
    return None


def _is_for(storage: Storage, run: dg.DagsterRun) -> bool:
    try:
        return configured_storage(storage, run.run_config).decision == storage.decision
    except (ValidationError, UserError):  # no storage, or one that the run alone can tell, such as {env: TEXTMILL_HOME}
        return False


def _reason(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """The step that failed and what it said; nothing where the run's process was killed before it could say anything."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        data = entry.get_dagster_event().step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            said = data.user_failure_data.description
        else:
            error = data.error
            said = (error.cause or error).message if error is not None else ""
        return f" at {entry.step_key}: {said.strip()[:_MOST_CHARACTERS]}"
    return ""
