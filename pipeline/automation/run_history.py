"""The history of Dagster runs: whether one is training, and why the last one failed."""

import dagster as dg
from dagster._core.definitions.assets.job.asset_job import IMPLICIT_ASSET_JOB_NAME
from pydantic import ValidationError

from llm_core.errors import UserError
from pipeline.assets.checkpoint import checkpoint
from pipeline.automation.jobs import pretrain, quickstart
from pipeline.automation.retraining import configured_storage
from pipeline.resources import Storage

# "Materialize" in the asset graph launches Dagster's own job with the selected assets.
_TRAIN = {pretrain.name, quickstart.name, IMPLICIT_ASSET_JOB_NAME}
_IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
# Number of the newest runs that are searched for the last training.
_RECENT_RUNS = 50
_MAX_MESSAGE_LENGTH = 500  # characters


def trains(run: dg.DagsterRun) -> bool:
    """Whether a run materializes the asset `checkpoint`."""
    return run.job_name in _TRAIN and (run.asset_selection is None or checkpoint.key in run.asset_selection)


def training_in_progress(instance: dg.DagsterInstance) -> str | None:
    """A message about a run that is training or queued to train; None if there is none."""
    runs = [run for run in instance.get_runs(filters=dg.RunsFilter(statuses=_IN_PROGRESS)) if trains(run)]
    return f"waiting for run {runs[0].run_id} of {runs[0].job_name} to end" if runs else None


def last_failure(instance: dg.DagsterInstance, storage: Storage) -> str | None:
    """Why the last training for this home and release line failed; None if it did not fail, or if there was none.

    The quickstart trains on its own text and does not count.
    """
    for run in instance.get_runs(limit=_RECENT_RUNS):
        if trains(run) and run.job_name != quickstart.name and _is_for(storage, run):
            if run.status == dg.DagsterRunStatus.CANCELED:
                return f"run {run.run_id} was cancelled"
            return f"run {run.run_id} failed{_reason(instance, run)}" if run.status == dg.DagsterRunStatus.FAILURE else None
    return None


def _is_for(storage: Storage, run: dg.DagsterRun) -> bool:
    try:
        return configured_storage(storage, run.run_config).decision == storage.decision
    except (ValidationError, UserError):  # invalid, or only known in the run, such as {env: TEXTMILL_HOME}
        return False


def _reason(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """The failed step and its error message; empty if the process was killed."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        data = entry.get_dagster_event().step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            message = data.user_failure_data.description
        else:
            error = data.error
            message = (error.cause or error).message if error is not None else ""
        return f" at {entry.step_key}: {message.strip()[:_MAX_MESSAGE_LENGTH]}"
    return ""
