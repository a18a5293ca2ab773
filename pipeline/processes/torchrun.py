"""A torchrun process that saves before it stops and cannot outlive its parent."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from pipeline.processes.interrupts import postponed_interrupts


def torchrun_arguments(module: str, nproc_per_node: int, folder: Path, options: Sequence[str]) -> list[str]:
    """Arguments for torchrun on one machine: its processes rendezvous in a file, so that no port is open to the network.

    folder: for torchrun's own files; deleted after it has ended.
    """
    return [
        "--nnodes=1",
        f"--nproc_per_node={nproc_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={folder.joinpath('torchrun')}",
        "--rdzv-conf=store_type=file",
        f"--log-dir={folder}",
        "--max-restarts=0",  # retries resume from a checkpoint, in a new torchrun
        "-m",
        module,
        *options,
    ]


class TorchrunProcess:
    """torchrun and its ranks. Leaving the `with` block stops them; interrupts are delayed until then."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log_path: Path, grace_seconds: float) -> None:
        self.command = [sys.executable, "-m", "pipeline.processes.child", "torch.distributed.run", *arguments]
        self.log_path = log_path
        self._environment = dict(environment)
        self._grace_seconds = grace_seconds
        self._exit = ExitStack()

    def __enter__(self) -> "TorchrunProcess":
        with ExitStack() as stack:
            self._interrupted = stack.enter_context(postponed_interrupts())
            log = stack.enter_context(open(self.log_path, "ab"))
            self._log_start = log.seek(0, os.SEEK_END)  # what precedes it is from earlier attempts
            self._process = subprocess.Popen(
                self.command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
            stack.callback(self.stop)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def wait(self, poll_seconds: float) -> Iterator[None]:
        """Yields about every `poll_seconds` until the training has ended or an interrupt has arrived."""
        due = time.monotonic() + poll_seconds
        while self._process.poll() is None and not self._interrupted():
            # Popen.wait with a timeout polls five times as often and takes CPU time from the training.
            time.sleep(min(0.1, poll_seconds))
            if time.monotonic() >= due:
                yield
                due = time.monotonic() + poll_seconds

    @property
    def exit_code(self) -> int:
        code = self._process.poll()
        assert code is not None, "the training is still running"
        return code

    def output(self) -> list[str]:
        """The lines that this process and its ranks have printed."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace").splitlines()

    def stop(self) -> None:
        """Asks the ranks to save and exit; kills those still running after the grace period."""
        if self._process.poll() is not None:
            return
        torchrun = psutil.Process(self._process.pid)
        ranks = torchrun.children(recursive=True)
        # The ranks are signalled directly: torchrun would give them only 30 seconds to save.
        for process in ranks or [torchrun]:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self._grace_seconds)
        # Ranks have their own process groups: killing torchrun's group would not reach them.
        for process in [torchrun, *ranks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
