"""What a failed step reports, and which failures are retried."""

import atexit
import sys

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._core.execution.plan.resume_retry import ReexecutionStrategy
from dagster._core.storage.tags import (
    RETRY_ON_ASSET_OR_OP_FAILURE_TAG,
    RETRY_STRATEGY_TAG,
)

from llm_core.cli import printable
from llm_core.errors import DataError, UserError


@dg.failure_hook
def report_failure(context: dg.HookContext) -> None:
    """Prints why a step failed in the last lines of stderr, where users at a terminal or in CI look first.

    Excludes the run from Dagster's retries (`run_retries` in dagster.yaml) if a retry cannot succeed, and makes retries start at
    the first step if the artifacts of earlier steps no longer fit.
    """
    error = context.op_exception
    print_at_exit(f"{context.step_key} failed: {_reason(error)}")
    final = isinstance(error, UserError | DagsterAssetCheckFailedError) or (
        isinstance(error, dg.Failure) and not error.allow_retries
    )
    instance = context.instance
    # Always set, since a retry inherits the tags of the failed run.
    retry = not final and instance.run_retries_retry_on_asset_or_op_failure
    instance.add_run_tags(context.run_id, {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: str(retry).lower()})
    if isinstance(error, DataError):
        # An earlier artifact no longer fits, for example because a file changed after the snapshot. A retry from the failed step
        # would fail again; earlier steps reuse what is unchanged.
        instance.add_run_tags(context.run_id, {RETRY_STRATEGY_TAG: ReexecutionStrategy.ALL_STEPS.value})


def print_at_exit(text: str) -> None:
    """Prints text to stderr when this process exits, after Dagster's tracebacks."""
    atexit.register(_print_to_stderr, f"textmill: {text}")


def _print_to_stderr(text: str) -> None:
    print("\n" + printable(text, keep="\n"), file=sys.stderr)  # sys.stderr at exit, not the one in the step


def _reason(error: BaseException | None) -> str:
    return (error.description if isinstance(error, dg.Failure) else str(error)) or type(error).__name__
