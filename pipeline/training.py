"""Runs one training under Dagster: launches torchrun, passes its progress on, and judges how it ended."""

import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import AssetExecutionContext, PipesTempFileContextInjector, open_pipes_session

from llm_core.checkpoint_files import CheckpointRecord, newest_valid
from llm_core.config import TrainConfig
from llm_core.errors import TextmillError, UserError
from llm_core.files import read_json
from llm_core.locks import held
from llm_core.shards import DatasetManifest
from pipeline.assets.common import literal
from pipeline.launcher import TorchrunProcess, option_list, torchrun_arguments, training_environment
from pipeline.messages import MessageFile
from pipeline.resources import Torchrun
from pipeline.retries import say_at_the_end

_ERROR = "python -m llm_core.train: error: "
"""How the training tool begins the message it ends with."""


def finished_checkpoint(run_dir: Path) -> CheckpointRecord | None:
    """The last checkpoint of a run that has reached its last step, if it is whole."""
    if not (run_dir / "run.json").exists():
        return None
    state = read_json(run_dir / "run.json")
    newest, _ = newest_valid(run_dir)
    done = state["status"] == "finished" and newest is not None and newest.step == state["config"]["max_steps"]
    return newest if done else None


class LiveRecords:
    """Records a run now and then while it trains; what goes wrong there is told and never ends the training."""

    MAX_SHARE = 0.05
    """Share of the time that recording may take: a long run has many metrics, and each record writes them all."""

    def __init__(self, context: AssetExecutionContext, record: Callable[[], None], seconds: float) -> None:
        self._context = context
        self._record = record
        self._seconds = seconds
        self._due = time.monotonic() + seconds

    def keep_up(self) -> None:
        started = time.monotonic()
        if started < self._due:
            return
        try:
            self._record()
        except (TextmillError, OSError) as error:
            self._context.log.warning(f"the metrics so far are not in the catalog, the training goes on: {error}")
        now = time.monotonic()
        self._due = now + max(self._seconds, (now - started) / self.MAX_SHARE)


def run_training(
    context: AssetExecutionContext,
    torchrun: Torchrun,
    config: TrainConfig,
    nproc_per_node: int,
    data_dir: Path,
    manifest: DatasetManifest,
    run_dir: Path,
    record: Callable[[], None],
) -> CheckpointRecord:
    """Trains to the end in `run_dir`, resuming what an earlier attempt left there, and returns the last checkpoint.

    record: puts the run as it stands into the catalog; called every `torchrun.catalog_seconds`.

    Raises:
        dagster.Failure: the training ended early; the description says why and what to do.
        UserError: another training is writing to `run_dir`.
    """
    data = {"data_dir": data_dir, "dataset_id": manifest.dataset_id, "snapshot_id": manifest.snapshot_id}
    options = option_list(data | {"save_dir": run_dir, "resume": "auto"} | config.model_dump(exclude_defaults=True))
    _wait_for_an_earlier_attempt(context, run_dir, torchrun.stop_seconds)
    before = _stamp(run_dir / "run.json")
    reported = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="textmill-")))
        messages = MessageFile(folder / "messages")
        session = stack.enter_context(open_pipes_session(context, PipesTempFileContextInjector(), messages))
        process = TorchrunProcess(
            torchrun_arguments("pipeline.training_rank", nproc_per_node, folder / "torchrun", options),
            training_environment(session.get_bootstrap_env_vars()),
            log_path=run_dir / "training.log",
            grace_seconds=torchrun.stop_seconds,
        )
        with _says_how_it_was_stopped(context, run_dir, config.max_steps), process:
            context.log.info(f"training: {shlex.join(process.command)}\noutput: {process.log_path}")
            live = LiveRecords(context, record, torchrun.catalog_seconds)
            for _ in process.wait(torchrun.report_seconds):
                messages.read()
                records = session.get_custom_messages()
                _report(context, records[reported:], config.max_steps)
                reported = len(records)
                live.keep_up()
    _report(context, session.get_custom_messages()[reported:], config.max_steps)  # what came after the last look
    last = finished_checkpoint(run_dir) if process.exit_code == 0 else None
    if last is None:
        raise _failure(run_dir, process, began=_stamp(run_dir / "run.json") != before)
    return last


@contextmanager
def _says_how_it_was_stopped(context: AssetExecutionContext, run_dir: Path, max_steps: int) -> Iterator[None]:
    """A step that is cancelled does not fail: no hook tells what became of the training, in the terminal or on the run's page."""
    try:
        yield
    except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
        state = read_json(run_dir / "run.json") if (run_dir / "run.json").exists() else {"status": "not started"}
        saved = state["status"] == "preempted"
        moment = f"at step {state['steps_done']} of {max_steps}, saved" if saved else "before it could save"
        told = f"the training was stopped {moment}; run the same job again and it goes on (in {run_dir})"
        say_at_the_end(told)
        context.log.warning(told)
        raise


def _wait_for_an_earlier_attempt(context: AssetExecutionContext, run_dir: Path, seconds: float) -> None:
    """Gives the ranks of a killed attempt so many seconds to save and end; whoever is still there then is another training.

    Raises:
        UserError: there is one; the message names the folder and the process.
    """

    def refuse(holder: str) -> None:
        raise UserError(f"{run_dir}: process {holder} is training in this folder; wait for it or stop it, then run again")

    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            with held(run_dir, refuse):
                return
        except UserError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                context.log.info(f"waiting up to {seconds:.0f} seconds: {error}")
                told = True
            time.sleep(0.2)


def _report(context: AssetExecutionContext, records: Any, max_steps: int) -> None:
    """Logs the newest training step and every validation; as observations they draw the asset page's live plots."""
    train = [record for record in records if record["kind"] == "train"]
    for record in [*train[-1:], *(record for record in records if record["kind"] == "eval")]:
        numbers = {
            name: value for name, value in record.items() if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if record["kind"] == "train" and record["tokens_per_second"]:
            tokens_per_step = record["tokens"] / record["step"]
            numbers["seconds_left"] = (max_steps - record["step"]) * tokens_per_step / record["tokens_per_second"]
        readable = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in numbers.items()}
        context.log_event(dg.AssetObservation(asset_key=context.asset_key, metadata=readable))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if name not in ("step", "tokens"))
        context.log.info(f"step {record['step']}/{max_steps}: {shown}")


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another one whenever the file is written anew; None while there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _failure(run_dir: Path, process: TorchrunProcess, began: bool) -> dg.Failure:
    """What the training said of its end; where it could say nothing, how it ended.

    began: whether it came so far as to write its state; what stands there otherwise is from an earlier attempt.
    """
    state = read_json(run_dir / "run.json") if began else {"status": "not started"}
    output = process.output()
    said = [line.removeprefix(_ERROR) for line in output if line.startswith(_ERROR)]
    reason = said[0] if said else f"the training ended with code {process.exit_code} and state {state['status']!r}"
    return dg.Failure(
        description=f"{reason}\nCheckpoints are kept in {run_dir}; running the job again resumes from the newest one.",
        metadata={
            "last_output": dg.MetadataValue.md(literal("\n".join(output[-40:]), width=160)),
            "log": dg.MetadataValue.path(process.log_path),
        },
        # What the training can explain does not go away by itself, unless it was asked to stop.
        allow_retries=not said or state["status"] == "preempted",
    )
