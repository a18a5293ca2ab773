"""What starts trainings by itself: the sensor for new text and the nightly schedule, both off until someone switches them on."""

import time
from collections.abc import Iterator

import dagster as dg
from pydantic import BaseModel, ValidationError

from llm_core.errors import UserError
from llm_core.files import content_id
from pipeline.automation import pretrain
from pipeline.new_text import NewText, Retraining, configured_storage, is_decided, retraining_config
from pipeline.resources import Storage
from pipeline.runs import last_failure, training_in_progress

SECONDS_BETWEEN_LOOKS = 30
NIGHTLY = "0 2 * * *"
"""Cron, in UTC."""


class Cursor(BaseModel):
    """What the sensor remembers from one look to the next, restarts of Dagster included."""

    seen: str | None = None
    """Fingerprint of the last look."""
    launched: str | None = None
    """Fingerprint of the text that the last run was launched for."""
    launched_at: float = 0.0
    """Seconds since 1970."""
    run_key: str | None = None

    @classmethod
    def read(cls, text: str | None) -> "Cursor":
        """An unreadable cursor, as after a reset by hand, is an empty one."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()

    def after_launch(self, fingerprint: str, now: float) -> "Cursor":
        # Each run key holds the one before: a folder that is again as it once was is a change as well.
        run_key = content_id(self.run_key, fingerprint)
        return Cursor(seen=fingerprint, launched=fingerprint, launched_at=now, run_key=run_key)


@dg.sensor(
    job=pretrain,
    minimum_interval_seconds=SECONDS_BETWEEN_LOOKS,
    description="Launches pretrain when files were added to the raw text, changed or removed, and are at rest: two looks "
    f"{SECONDS_BETWEEN_LOOKS} seconds apart found them the same. One run for each change, with the configuration in "
    "configs/retrain.yaml.",
)
def new_raw_text(
    context: dg.SensorEvaluationContext, storage: Storage, retraining: Retraining
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    cursor, now = Cursor.read(context.cursor), time.time()
    # What costs nothing is asked first: a large folder is not walked while nothing could be launched anyway.
    wait = training_in_progress(context.instance) or _interval(cursor.launched_at, retraining.min_hours_between_runs, now)
    if wait:
        yield dg.SkipReason(wait)
        return
    run_config = retraining_config(storage)
    storage = configured_storage(storage, run_config)
    try:
        text = NewText.find(storage)
    except UserError as error:
        yield dg.SkipReason(str(error))
        return
    at_rest = cursor.seen == text.fingerprint
    cursor.seen = text.fingerprint
    if not text:
        reason: str | None = f"nothing new: all {text.files:,} files are as they were read last" + _unfinished(context, storage)
    elif text.fingerprint == cursor.launched:
        reason = f"a run was launched for this text already ({text}){_to_mend(context, storage)}"
    elif not at_rest:
        reason = f"{text}: waiting until they are at rest"
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
    description="Launches pretrain at night when there is text on which no training has come to its end, a released model or one "
    "that was not better, with the configuration in configs/retrain.yaml.",
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
        return dg.SkipReason(str(error))
    if not text and is_decided(storage):
        return dg.SkipReason(f"nothing new: all {text.files:,} files are in the dataset that was trained on last")
    reason = retraining.reason_to_refuse(text)
    return dg.SkipReason(reason) if reason else dg.RunRequest(run_config=run_config)


def _unfinished(context: dg.SensorEvaluationContext, storage: Storage) -> str:
    """What is left to do about text that was read; nothing once there is a decision about a model of it."""
    if is_decided(storage):
        return ""
    return _to_mend(context, storage) or ", but no training has come to its end on them: launch pretrain by hand"


def _to_mend(context: dg.SensorEvaluationContext, storage: Storage) -> str:
    """What the last training failed of and what to do, if it failed."""
    failure = last_failure(context.instance, storage)
    return f"; {failure}\nWhen that is mended, launch pretrain by hand or let nightly_retraining try again." if failure else ""


def _interval(launched_at: float, min_hours: float, now: float) -> str | None:
    """What is left of the time between two runs, None if it is over."""
    minutes = (launched_at - now) / 60 + min_hours * 60
    return f"the next run may start in {minutes:.0f} minutes (min_hours_between_runs {min_hours:g})" if minutes > 0 else None
