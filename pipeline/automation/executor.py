"""Runs the steps of a job, and records a job that Ctrl-C stopped as canceled."""

import atexit
import signal
from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._core.system_config.objects import ResolvedRunConfig

from llm_core.interrupts import exit_interrupted
from pipeline.automation.cpu_hours import warning_of_hours
from pipeline.failures import print_at_exit


class CancelableExecutor(dg.Executor):
    """Dagster's in-process executor, for which Ctrl-C in `dagster job execute` is a request to cancel the run.

    For Dagster, only its web UI can cancel a run; any other interrupt is a failure, reported with a stack trace. That is right
    for the runs that Dagster launched, which it retries after a shutdown of the machine: they are left as they are.
    """

    def __init__(self, in_process: dg.Executor) -> None:
        self._in_process = in_process

    @property
    def retries(self) -> Any:
        return self._in_process.retries

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        if (warning := warning_of_hours(_options_of_steps(plan_context, execution_plan))) is not None:
            plan_context.log.warning(warning)
        events: Iterator[dg.DagsterEvent] = self._in_process.execute(plan_context, execution_plan)
        if plan_context.dagster_run.remote_job_origin is not None:  # launched by Dagster
            yield from map(_without_error, events)
            return
        canceled: list[bool] = []
        atexit.register(_exit_if, canceled)  # now, so that it comes after every `print_at_exit`
        failed = False
        try:
            for event in _shielding_log_capture(events):
                failed = failed or event.is_step_failure
                yield _without_error(event)
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError) as interrupt:
            canceled.append(True)
            if not str(interrupt):  # the step has not reported it
                print_at_exit("the run was stopped; run the same job again to continue: what is complete is reused")
            plan_context.instance.report_run_canceling(plan_context.dagster_run, "Stopped by Ctrl-C or SIGTERM.")
            if not failed:  # between two steps: without an exception, Dagster would take the job for complete
                raise


def _options_of_steps(plan_context: Any, execution_plan: Any) -> dict[str, Any]:
    """The options of every asset of the job, if the run trains."""
    if not any(step.node_handle.name == "checkpoint" for step in execution_plan.steps):
        return {}
    resolved = ResolvedRunConfig.build(plan_context.job.get_definition(), plan_context.dagster_run.run_config)
    return {name: entry.config or {} for name, entry in resolved.ops.items()}


def _without_error(event: dg.DagsterEvent) -> dg.DagsterEvent:
    """A step failure, which the log already has, without its error: the failure of the run would repeat it."""
    if not event.is_step_failure:
        return event
    data: Any = event.event_specific_data
    return event._replace(event_specific_data=data._replace(error=None))


def _shielding_log_capture(events: Iterator[dg.DagsterEvent]) -> Iterator[dg.DagsterEvent]:
    """Lets the processes with which Dagster copies the output to the terminal inherit a block of SIGINT.

    Ctrl-C reaches them too: they would print a traceback, and end before the output does. In this process the signal is delayed
    until they have started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for event in events:
            if event.event_type in (dg.DagsterEventType.LOGS_CAPTURED, dg.DagsterEventType.STEP_START):
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            yield event
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _exit_if(canceled: list[bool]) -> None:
    if canceled:
        exit_interrupted()


def _make(context: dg.InitExecutorContext) -> CancelableExecutor:
    make_in_process: Any = dg.in_process_executor.executor_creation_fn
    return CancelableExecutor(make_in_process(context))


_schema: Any = dg.in_process_executor.config_schema
cancelable_executor = dg.ExecutorDefinition("in_process", _schema, executor_creation_fn=_make)
