"""Runs one training under Dagster: launches torchrun, reports progress, and explains a failure."""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import (
    AssetExecutionContext,
    PipesFileContextInjector,
    PipesMessageHandler,
    PipesMessageReader,
    open_pipes_session,
)
from dagster_pipes import PipesDefaultMessageWriter, PipesParams

from llm_core.checkpoint import CheckpointRecord, RunRecord, newest_valid
from llm_core.config import ResolvedTrainConfig, TrainConfig
from llm_core.dataset import DatasetManifest
from llm_core.errors import TextmillError, UserError
from llm_core.layout import RunFolder
from llm_core.system import held, temporary_folder
from pipeline.failures import print_at_exit
from pipeline.presentation import literal
from pipeline.processes.tools import option_list, training_environment
from pipeline.processes.torchrun import TorchrunProcess, torchrun_arguments
from pipeline.resources import Torchrun

# An error message of the training tool; with several ranks it starts with the rank.
_ERROR = re.compile(r"(?:\[rank \d+\] )?python -m llm_core\.train: error: (.*)")


def finished_checkpoint(run_dir: Path) -> CheckpointRecord | None:
    """The last checkpoint of a finished run, if it is intact."""
    run = RunRecord.find(run_dir)
    if run is None or run.status != "finished" or run.removed_at is not None:
        return None
    newest, _ = newest_valid(run_dir)
    return newest if newest is not None and newest.step == run.train_config(run_dir)["max_steps"] else None


def run_training(
    context: AssetExecutionContext,
    torchrun: Torchrun,
    config: ResolvedTrainConfig,
    nproc_per_node: int,
    data_dir: Path,
    manifest: DatasetManifest,
    run_dir: Path,
    record: Callable[[], None],
) -> CheckpointRecord:
    """Trains to the end in `run_dir`, resuming an earlier attempt, and returns the last checkpoint.

    record: records the current state of the run in the catalog; called about every `torchrun.catalog_seconds`.

    Raises:
        dagster.Failure: the training ended early; the description gives the reason and the remedy.
        UserError: another training is writing to `run_dir`.
    """
    data = {"data_dir": data_dir, "dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id}
    options = option_list(data | {"save_dir": run_dir, "resume": "auto"} | config.model_dump(exclude_defaults=True))
    _wait_for_earlier_attempt(context, run_dir, torchrun.stop_seconds)
    before = _stamp(RunFolder(run_dir).record)
    reported = 0
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        messages = MessageFile(folder.joinpath("messages"))
        injector = PipesFileContextInjector(str(folder.joinpath("context")))
        session = stack.enter_context(open_pipes_session(context, injector, messages))
        process = TorchrunProcess(
            torchrun_arguments("pipeline.processes.training_rank", nproc_per_node, folder, options),
            training_environment(session.get_bootstrap_env_vars()),
            log_path=RunFolder(run_dir).log,
            grace_seconds=torchrun.stop_seconds,
        )
        with _report_interruption(context, run_dir, config.max_steps), process:
            context.log.info(f"training: {shlex.join(process.command)}\noutput: {process.log_path}")
            live = LiveRecords(context, record, torchrun.catalog_seconds)
            for _ in process.wait(torchrun.report_seconds):
                messages.read()
                records = session.get_custom_messages()
                _report(context, records[reported:], config.max_steps)
                reported = len(records)
                live.record_if_due()
    _report(context, session.get_custom_messages()[reported:], config.max_steps)  # records since the last report
    last = finished_checkpoint(run_dir) if process.exit_code == 0 else None
    if last is None:
        raise _failure(run_dir, process, started=_stamp(RunFolder(run_dir).record) != before)
    return last


def run_planning(
    context: AssetExecutionContext,
    torchrun: Torchrun,
    config: TrainConfig,
    nproc_per_node: int,
    data_dir: Path,
    manifest: DatasetManifest,
    folder: Path,
) -> None:
    """Measures this machine for a run with `train_minutes`; the plan is in `folder` afterwards.

    Raises:
        dagster.Failure: the measurement ended early; the description gives the reason and the remedy.
    """
    data = {"data_dir": data_dir, "dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id}
    options = option_list(data | {"save_dir": folder, "explain": True} | config.model_dump(exclude_defaults=True))
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as temporary:
        process = TorchrunProcess(
            torchrun_arguments("llm_core.train", nproc_per_node, temporary, options),
            training_environment({}),
            log_path=RunFolder(folder).log,
            grace_seconds=torchrun.stop_seconds,
        )
        with process:
            context.log.info(f"measuring this machine for train_minutes {config.train_minutes:g}: {shlex.join(process.command)}")
            for _ in process.wait(torchrun.report_seconds):
                pass
    if process.exit_code:
        output = process.output()
        reason = _reported_error(output)
        raise dg.Failure(
            description=reason or f"the measurement for train_minutes ended with code {process.exit_code}",
            metadata=_last_output(process, output),
            # An error that it reports recurs, unless it was asked to stop.
            allow_retries=reason is None or "stopped on request" in reason,
        )


def _wait_for_earlier_attempt(context: AssetExecutionContext, run_dir: Path, seconds: float) -> None:
    """Waits up to `seconds` for the ranks of a killed attempt to save and exit.

    Raises:
        UserError: a training is still running in the folder; the message names its process.
    """

    def refuse(pid: str) -> None:
        raise UserError(f"{run_dir}: process {pid} is training in this folder; wait for it or stop it, then run again")

    deadline, logged = time.monotonic() + seconds, False
    while True:
        try:
            with held(run_dir, refuse):
                return
        except UserError as error:
            if time.monotonic() >= deadline:
                raise
            if not logged:
                context.log.info(f"waiting up to {seconds:.0f} seconds: {error}")
                logged = True
            time.sleep(0.2)


@contextmanager
def _report_interruption(context: AssetExecutionContext, run_dir: Path, max_steps: int) -> Iterator[None]:
    """Reports the state of a cancelled training. A cancelled step does not fail, so no failure hook runs."""
    try:
        yield
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        run = RunRecord.find(run_dir)
        saved = run is not None and run.status == "preempted"
        state = f"at step {run.steps_done} of {max_steps}, saved" if run is not None and saved else "before it could save"
        message = f"the training was stopped {state}; run the same job again to continue it (in {run_dir})"
        print_at_exit(message)
        context.log.warning(message)
        raise dg.DagsterExecutionInterruptedError(message) from None


class LiveRecords:
    """Records a run in the catalog at intervals while it trains. Errors are logged and never end the training."""

    # Share of the time that recording may take: each record writes all metrics of the run so far.
    MAX_SHARE = 0.05

    def __init__(self, context: AssetExecutionContext, record: Callable[[], None], seconds: float) -> None:
        self._context = context
        self._record = record
        self._seconds = seconds
        self._due = time.monotonic() + seconds

    def record_if_due(self) -> None:
        started = time.monotonic()
        if started < self._due:
            return
        try:
            self._record()
        except (TextmillError, OSError) as error:
            self._context.log.warning(f"the latest metrics are not in the catalog; training continues: {error}")
        ended = time.monotonic()
        self._due = ended + max(self._seconds, (ended - started) / self.MAX_SHARE)


def _report(context: AssetExecutionContext, records: Any, max_steps: int) -> None:
    """Logs the newest training step and every validation, each with an observation that the asset page plots."""
    train, validations = ([record for record in records if record["kind"] == kind] for kind in ("train", "eval"))
    for record in [*train[-1:], *validations]:
        step = record["step"]
        numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
        if record.get("tokens_per_second"):
            numbers["seconds_left"] = (max_steps - step) * (record["tokens"] / step) / record["tokens_per_second"]
        readable = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in numbers.items()}
        context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=readable))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if name not in ("step", "tokens"))
        context.log.info(f"step {step}/{max_steps}: {shown}")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is rewritten; None while it does not exist."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _failure(run_dir: Path, process: TorchrunProcess, started: bool) -> dg.Failure:
    """The training's own error message, or else its exit code and status.

    started: whether this attempt wrote run.json; otherwise the file is from an earlier attempt.
    """
    status = RunRecord.read(run_dir).status if started else "not started"
    output = process.output()
    error = _reported_error(output)
    reason = error or f"the training ended with code {process.exit_code} and status {status!r}"
    return dg.Failure(
        description=f"{reason}\nCheckpoints are in {run_dir}; running the job again resumes from the newest one.",
        metadata=_last_output(process, output),
        # An error that the training reports recurs, unless the training was asked to stop.
        allow_retries=error is None or status == "preempted",
    )


def _reported_error(output: list[str]) -> str | None:
    """The error message of the training tool."""
    return next((match[1] for line in output if (match := _ERROR.match(line))), None)


def _last_output(process: TorchrunProcess, output: list[str]) -> dict[str, dg.MetadataValue]:
    last = dg.MetadataValue.md(literal("\n".join(output[-40:]), width=160))
    return {"last_output": last, "log": dg.MetadataValue.path(process.log_path)}


class MessageFile(PipesMessageReader):
    """Messages in a file, one per line. Messages after the last `read` are read when the session ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = b""

    @property
    def expected_writer_count(self) -> int:
        """Rank 0 only. Dagster's default is the same, but logs a warning about a preview feature in every run."""
        return 1

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        self._handler = handler
        with open(self._path, "x+b") as self._file:
            try:
                yield {PipesDefaultMessageWriter.FILE_PATH_KEY: str(self._path)}
            finally:
                self.read()

    def read(self) -> None:
        """Handles the complete new lines. An unreadable line is logged and never ends the training."""
        *lines, self._torn = (self._torn + self._file.read()).split(b"\n")
        for line in lines:
            try:
                self._handler.handle_message(json.loads(line))
            except Exception:
                self._handler.report_pipes_framework_exception(f"{self._path}: {line!r}", sys.exc_info())

    def no_messages_debug_text(self) -> str:
        return f"No message was written to {self._path}."
