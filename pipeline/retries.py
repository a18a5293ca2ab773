"""Which failures are worth another run."""

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._core.storage.tags import MAX_RETRIES_TAG
from pydantic import ValidationError

from llm_core.errors import UserError


@dg.failure_hook
def retry_only_what_may_go_away(context: dg.HookContext) -> None:
    """Takes the run out of Dagster's run retries (`run_retries` in dagster.yaml) when running again unchanged cannot help."""
    error = context.op_exception
    final = isinstance(error, UserError | ValidationError | DagsterAssetCheckFailedError) or (
        isinstance(error, dg.Failure) and not error.allow_retries
    )
    if final:
        context.instance.add_run_tags(context.run_id, {MAX_RETRIES_TAG: "0"})
