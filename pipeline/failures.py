"""What a failed step reports, and which failures are retried."""

import atexit
import functools
import logging
import re
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError
from dagster._core.execution.plan.resume_retry import ReexecutionStrategy
from dagster._core.storage.tags import (
    RETRY_ON_ASSET_OR_OP_FAILURE_TAG,
    RETRY_STRATEGY_TAG,
)

from llm_core.cli import printable
from llm_core.config import StageConfig
from llm_core.errors import DataError, TextmillError, UserError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Flags of llm_core's tools that have another name in a run configuration; an option of a stage has the same name in both.
_OTHER_NAMES = {
    "input_dir": "storage.raw_text_dir",
    "output_dir": "storage.home",
    "data_dir": "storage.home",
    "save_dir": "storage.home",
    "model_dir": "storage.home",
    "dataset_id": "dataset",
    "snapshot_id": "snapshot",
    "checkpoint": "checkpoint",
    "retrain_tokenizer": "retrain_tokenizer: true",
}
_STAGE_OPTIONS = {"nproc_per_node"}.union(*(stage.model_fields for stage in StageConfig.__subclasses__()))
# Not within a path or a name.
_FLAG = re.compile(r"(?<![^\s('\"`])--([a-z]\w*)")


def in_run_config(message: str) -> str:
    """A message of the library, which names flags of its tools, with the names in a run configuration instead."""

    def name(flag: re.Match[str]) -> str:
        option = flag[1]
        return _OTHER_NAMES.get(option, option if option in _STAGE_OPTIONS else flag[0])

    return _FLAG.sub(name, message)


def one_line_errors(compute: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function of an asset whose errors for the user are reported as in the run configuration, without a stack trace.

    Such an error says all that a user needs; other errors are programming errors and keep their stack trace.
    """

    @functools.wraps(compute)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return compute(*args, **kwargs)
        except (TextmillError, dg.Failure) as error:
            dg.AssetExecutionContext.get().log.addFilter(_hide_stack)
            if not isinstance(error, dg.Failure):
                error.args = (in_run_config(str(error)),)
                raise error.with_traceback(None) from None
            description = in_run_config(error.description or "")
            raise dg.Failure(description, error.metadata, error.allow_retries) from None

    return run


def _hide_stack(record: logging.LogRecord) -> bool:
    """A filter of a step's log that removes the stack traces from its failure event."""
    for name, event in [*vars(record).items()]:
        if isinstance(event, dg.DagsterEvent) and event.is_step_failure:
            data: Any = event.event_specific_data
            cause = data.error.cause and data.error.cause.to_exception_message_only()
            error = data.error._replace(stack=[], cause=cause, context=None)
            setattr(record, name, event._replace(event_specific_data=data._replace(error=error)))
    return True


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
