"""Commands with all that they start: looked at by level, signalled, and waited for until none of their processes is left."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PATIENCE = 600.0
"""Seconds after which something that should have ended counts as left."""

_MARK = "TORCH_FAULTS_TRIAL"
"""Environment variable that every process of a command has; the prefix lets it through to a training under Dagster."""

_TORCHRUN = "torch.distributed.run"
_RANK = ("llm_core.train", "pipeline.training_rank")


class Command:
    """One command with its whole family, whoever of it has died meanwhile. Leaving the `with` block kills what is left."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """arguments: what follows `python -m`."""
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
                start_new_session=True,  # a signal reaches the processes it was sent to and no others
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()

    def family(self) -> list[psutil.Process]:
        """Every living process of the command, orphans too."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def level(self, name: str) -> list[psutil.Process]:
        """The processes at one level: command, torchrun, rank 0, rank 1, ... or all of them."""
        if name == "all":
            return self.family()
        if name == "command":
            return [process for process in self.family() if process.pid == self.process.pid]
        return [process for process in self.family() if name in _levels(process)]

    def signal(self, number: int, name: str) -> None:
        """Sends a signal to a level; to the command itself while that level is not there."""
        for process in self.level(name) or self.level("command"):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The command's exit code; None if it has not ended by then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def left(self, seconds: float = 120.0) -> list[str]:
        """What is still running after so many seconds, or nothing as soon as all have ended."""
        deadline = time.monotonic() + seconds
        while (alive := self.family()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{process.pid}: {' '.join(_arguments(process)[:6])}" for process in alive]

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == self._mark
        except psutil.Error:
            return False


def wait_until(happened: Callable[[], bool], command: Command, seconds: float = PATIENCE) -> bool:
    """Looks until something has happened; False if the command ended or the time was over before."""
    deadline = time.monotonic() + seconds
    while not happened():
        if command.process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_for_a_step(command: Command, run_dir: Path) -> bool:
    """Waits until the training of a run directory has logged a step; False if it ended or the time was over before."""
    metrics = run_dir / "metrics.jsonl"
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
