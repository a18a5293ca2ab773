"""Commands with all their child processes: found by level, signalled, and waited for until none is left."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from llm_core.layout import RunFolder

# Seconds after which a process that should have ended counts as left behind.
PATIENCE = 600.0

# Environment variable of every process of a command; a training under Dagster inherits variables with this prefix.
_MARK = "TORCH_FAULTS_TRIAL"

_TORCHRUN = "torch.distributed.run"
_RANK = ("llm_core.train", "pipeline.processes.training_rank")


class Command:
    """A command and its descendants, orphans included. Leaving the `with` block kills those that still run."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """arguments: those after `python -m`."""
        self._mark = uuid.uuid4().hex
        self._log = log
        variables = {"OMP_NUM_THREADS": "1", _MARK: self._mark} | dict(environment or {})
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
                start_new_session=True,  # a signal reaches only the processes it is sent to
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """Every running process of the command, orphans included."""
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def level(self, name: str) -> list[psutil.Process]:
        """The processes of a level: command, torchrun, rank 0, rank 1, ... or all."""
        if name == "all":
            return self.family()
        if name == "command":
            return [process for process in self.family() if process.pid == self.process.pid]
        return [process for process in self.family() if name in _levels(process)]

    def signal(self, number: int, name: str) -> None:
        """Sends a signal to a level, or to the command itself if that level has no process yet."""
        for process in self.level(name) or self.level("command"):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The command's exit code, None if it still runs after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def left(self, seconds: float = 120.0) -> list[str]:
        """Waits for all processes to end and returns those that still run after `seconds`."""
        deadline = time.monotonic() + seconds
        while (alive := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{process.pid}: {' '.join(_arguments(process)[:6])}" for process in alive]

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == self._mark
        except psutil.Error:
            return False


def wait_until(happened: Callable[[], bool], command: Command, seconds: float = PATIENCE) -> bool:
    """Polls until `happened` returns True; False if the command ends or the time runs out first."""
    deadline = time.monotonic() + seconds
    while not happened():
        if command.process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_for_a_step(command: Command, run_dir: Path) -> bool:
    """Waits until the training has logged a step; False if it ends or the time runs out first."""
    metrics = RunFolder(run_dir).metrics
    return wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, command)


def _levels(process: psutil.Process) -> list[str]:
    arguments = _arguments(process)
    if _TORCHRUN in arguments:
        return ["torchrun"]
    if any(module in arguments for module in _RANK):
        with suppress(psutil.Error):
            return [f"rank {process.environ().get('RANK', 0)}"]
    return []


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
