"""Automatic training: a sensor for new text and a nightly schedule, both off by default, and a sensor for lost retries."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg
from dagster._core.storage.tags import (
    AUTO_RETRY_RUN_ID_TAG,
    WILL_RETRY_TAG,
)
from pydantic import BaseModel, ValidationError

from llm_core.errors import UserError
from llm_core.system import content_id
from pipeline.artifacts.release import is_decided
from pipeline.automation.jobs import pretrain
from pipeline.automation.retraining import NewText, Retraining, configured_storage, retraining_config
from pipeline.automation.run_history import last_failure, training_in_progress
from pipeline.failures import in_run_config
from pipeline.resources import Storage

SECONDS_BETWEEN_TICKS = 30
# Cron, in UTC.
NIGHTLY = "0 2 * * *"


class Cursor(BaseModel):
    """State of the sensor between ticks; it survives restarts of Dagster."""

    # Fingerprint of the text at the last tick.
    seen: str | None = None
    # Fingerprint of the text of the last launched run.
    launched: str | None = None
    # Seconds since 1970.
    launched_at: float = 0.0
    run_key: str | None = None

    @classmethod
    def read(cls, text: str | None) -> "Cursor":
        """Parses a cursor; an invalid one, such as one that was edited manually, counts as empty."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()

    def after_launch(self, fingerprint: str, now: float) -> "Cursor":
        # Hashed with the previous key: Dagster ignores a key it knows, and the folder may return to an earlier state.
        run_key = content_id(self.run_key, fingerprint)
        return Cursor(seen=fingerprint, launched=fingerprint, launched_at=now, run_key=run_key)


@dg.sensor(
    job=pretrain,
    minimum_interval_seconds=SECONDS_BETWEEN_TICKS,
    description="Launches pretrain after raw text files are added, changed or removed, once they stay the same for "
    f"{SECONDS_BETWEEN_TICKS} seconds. Each change launches one run, configured by configs/retrain.yaml.",
)
def new_raw_text(
    context: dg.SensorEvaluationContext, storage: Storage, retraining: Retraining
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    cursor, now = Cursor.read(context.cursor), time.time()
    # Cheap checks first: do not walk a large folder while nothing can be launched.
    wait = training_in_progress(context.instance) or _interval(cursor.launched_at, retraining.min_hours_between_runs, now)
    if wait:
        yield dg.SkipReason(wait)
        return
    run_config = retraining_config(storage)
    storage = configured_storage(storage, run_config)
    try:
        text = NewText.find(storage)
    except UserError as error:
        yield dg.SkipReason(in_run_config(str(error)))
        return
    stable = cursor.seen == text.fingerprint
    cursor.seen = text.fingerprint
    if not text:
        reason: str | None = f"nothing new: all {text.files:,} files are unchanged since they were read" + _unfinished(
            context, storage
        )
    elif text.fingerprint == cursor.launched:
        reason = f"a run was already launched for this text ({text}){_last_failure(context, storage)}"
    elif not stable:
        reason = f"{text}: waiting until they stop changing"
    else:
        reason = retraining.reason_to_refuse(text)
    if reason is None:
        cursor = cursor.after_launch(text.fingerprint, now)
        context.log.info(f"{text}: launching pretrain")
        yield dg.RunRequest(run_key=cursor.run_key, run_config=run_config)
    else:
        yield dg.SkipReason(reason)
    context.update_cursor(cursor.model_dump_json())


@dg.schedule(
    job=pretrain,
    cron_schedule=NIGHTLY,
    description="Launches pretrain at 02:00 UTC if there is text without a completed training, configured by "
    "configs/retrain.yaml. A training is complete once its model is released or rejected as no better than the released one.",
)
def nightly_retraining(
    context: dg.ScheduleEvaluationContext, storage: Storage, retraining: Retraining
) -> dg.RunRequest | dg.SkipReason:
    busy = training_in_progress(context.instance)
    if busy:
        return dg.SkipReason(busy)
    run_config = retraining_config(storage)
    storage = configured_storage(storage, run_config)
    try:
        text = NewText.find(storage)
    except UserError as error:
        return dg.SkipReason(in_run_config(str(error)))
    if not text and is_decided(storage):
        return dg.SkipReason(f"nothing new: all {text.files:,} files are in the dataset that was trained on last")
    reason = retraining.reason_to_refuse(text)
    return dg.SkipReason(reason) if reason else dg.RunRequest(run_config=run_config)


def _unfinished(context: dg.SensorEvaluationContext, storage: Storage) -> str:
    """What remains to be done for text that was read; empty once a release decision is based on it."""
    if is_decided(storage):
        return ""
    return _last_failure(context, storage) or ", but no training on them is complete: launch pretrain manually"


def _last_failure(context: dg.SensorEvaluationContext, storage: Storage) -> str:
    """Why the last training failed, and the remedy; empty if it did not fail."""
    failure = last_failure(context.instance, storage)
    return f"; {failure}\nOnce that is fixed, launch pretrain manually or let nightly_retraining try again." if failure else ""


def _interval(launched_at: float, min_hours: float, now: float) -> str | None:
    """The remaining time until the next run may start; None if it has passed."""
    minutes = (launched_at - now) / 60 + min_hours * 60
    return f"the next run may start in {minutes:.0f} minutes (min_hours_between_runs {min_hours:g})" if minutes > 0 else None


# The value is the id of the failed run, since a retry inherits the tag.
REPORTED_AGAIN_TAG = "textmill/retry_asked_again"
# Dagster's daemon decides on a retry and launches it within a few seconds of the failure.
_MIN_AGE = timedelta(seconds=30)
_MAX_AGE = timedelta(days=1)


@dg.sensor(
    name="lost_retries",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reports a failed run to Dagster again if its retry was never launched. Each run is reported once.",
)
def lost_retries(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Works around a race in Dagster (dagster-io/dagster#33741).

    Dagster writes the failure event before the status of the run. A daemon that reads in between never retries the run.
    """
    now = datetime.now(UTC)
    failed = context.instance.get_run_records(
        dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={WILL_RETRY_TAG: "true"}, updated_after=now - _MAX_AGE)
    )
    lost = [
        record.dagster_run
        for record in failed
        if record.update_timestamp < now - _MIN_AGE
        and AUTO_RETRY_RUN_ID_TAG not in record.dagster_run.tags
        and record.dagster_run.tags.get(REPORTED_AGAIN_TAG) != record.dagster_run.run_id
        and record.dagster_run.remote_job_origin is not None  # Dagster can relaunch only what it launched
    ]
    for run in lost:
        context.instance.add_run_tags(run.run_id, {REPORTED_AGAIN_TAG: run.run_id})
        context.instance.report_run_failed(run, "The retry of this run was never launched: its failure is reported again.")
    return dg.SkipReason(f"reported again: {len(lost)} failed runs" if lost else None)
