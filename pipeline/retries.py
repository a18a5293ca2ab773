"""What is said of a failure, which failures are worth another run, and that none of those runs is forgotten."""

import atexit
import sys
from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._core.execution.plan.resume_retry import ReexecutionStrategy
from dagster._core.storage.tags import (
    AUTO_RETRY_RUN_ID_TAG,
    RETRY_ON_ASSET_OR_OP_FAILURE_TAG,
    RETRY_STRATEGY_TAG,
    WILL_RETRY_TAG,
)
from pydantic import ValidationError

from llm_core.cli import describe_invalid, printable
from llm_core.errors import DataError, UserError

ASKED_AGAIN_TAG = "textmill/retry_asked_again"
"""Its value is the run's own id: a run that goes on from this one inherits the tag."""
# Dagster's daemon decides on a retry within a few seconds of the failure, and takes about as long to launch it.
_PATIENCE = timedelta(seconds=30)
_TOO_LATE = timedelta(days=1)


@dg.failure_hook
def say_why_and_retry_only_what_may_go_away(context: dg.HookContext) -> None:
    """Says why a step failed in the last lines of stderr, where a person at a terminal or in CI looks first.

    Takes the run out of Dagster's run retries (`run_retries` in dagster.yaml) when running again unchanged cannot help, and lets
    them begin with its first step when what earlier steps made no longer fits.
    """
    error = context.op_exception
    say_at_the_end(f"{context.step_key} failed: {_reason(error)}")
    if isinstance(error, ValidationError):
        _let_go_of_the_frames(error)
    final = isinstance(error, UserError | ValidationError | DagsterAssetCheckFailedError) or (
        isinstance(error, dg.Failure) and not error.allow_retries
    )
    instance = context.instance
    # Said either way: a run that goes on from a failed one inherits its tags.
    again = not final and instance.run_retries_retry_on_asset_or_op_failure
    instance.add_run_tags(context.run_id, {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: str(again).lower()})
    if isinstance(error, DataError):
        # What an earlier step made does not fit any more, as when a file changed after the snapshot: a retry from the step that
        # failed would meet it again. The steps before make anew what differs, and no more.
        instance.add_run_tags(context.run_id, {RETRY_STRATEGY_TAG: ReexecutionStrategy.ALL_STEPS.value})


def say_at_the_end(text: str) -> None:
    """Has it in the last lines of this process: Dagster prints its tracebacks before, and that the run failed after these."""
    atexit.register(_say, f"textmill: {text}")


def _say(text: str) -> None:
    print("\n" + printable(text, keep="\n"), file=sys.stderr)  # as stderr is by then, not as it was in the step


def _reason(error: BaseException | None) -> str:
    if isinstance(error, ValidationError):
        return describe_invalid(error, prefix="")
    return (error.description if isinstance(error, dg.Failure) else str(error)) or type(error).__name__


def _let_go_of_the_frames(error: ValidationError) -> None:
    """Pydantic holds what a validator raised where Python's garbage collection does not look.

    With its traceback all frames of the step would stay to the very end, and DuckDB's binding report its objects as leaked.
    """
    for problem in error.errors():
        if isinstance(raised := problem.get("ctx", {}).get("error"), BaseException):
            raised.__traceback__ = None


@dg.sensor(
    name="lost_retries",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reports the failure of a run once more to Dagster where the retry that it was to have was never launched.",
)
def lost_retries(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Dagster writes the event of a failure before the status of its run; a daemon that looks in between skips the run for ever.

    The look is rarely that unlucky (dagster-io/dagster#33741), but a nightly training would stand still until somebody noticed.
    """
    now = datetime.now(UTC)
    failed = context.instance.get_run_records(
        dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={WILL_RETRY_TAG: "true"}, updated_after=now - _TOO_LATE)
    )
    lost = [
        record.dagster_run
        for record in failed
        if record.update_timestamp < now - _PATIENCE
        and AUTO_RETRY_RUN_ID_TAG not in record.dagster_run.tags
        and record.dagster_run.tags.get(ASKED_AGAIN_TAG) != record.dagster_run.run_id
        and record.dagster_run.remote_job_origin is not None  # Dagster cannot launch again what was not launched by it
    ]
    for run in lost:
        context.instance.add_run_tags(run.run_id, {ASKED_AGAIN_TAG: run.run_id})
        context.instance.report_run_failed(run, "It was to be launched again and was not: reported once more.")
    return dg.SkipReason(f"retries asked for again: {len(lost)}" if lost else None)
