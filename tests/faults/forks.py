"""Training in forks of a process that has loaded PyTorch: a trial takes a fraction of a second.

Each child runs all of `llm_core.training.run.train`, with its own files, lock and signals.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_core.config import TrainConfig
from llm_core.errors import TextmillError
from llm_core.layout import RunFolder
from llm_core.training import loop, read_metrics
from llm_core.training.run import train
from tests.support.training import SMALL

OPTIONS: dict[str, Any] = SMALL | {
    "max_steps": 12,
    "batch_size": 4,
    "save_interval": 2,
    "eval_interval": 4,
    "keep_checkpoints": 3,
    "device": "cpu",
    "threads_per_process": 1,
}

# Seconds after which a child counts as hung and is killed.
HUNG = 300.0

T = TypeVar("T")


def prepare() -> None:
    """Called once in the parent: no threads, because a fork loses them, and no peak measurement in each child."""
    torch.set_num_threads(1)
    loop.measure_peak_flops = lambda *_: 1e9


def in_new_process(scenario: Callable[..., T], *arguments: Any) -> T:
    """Runs `scenario` in a new process, which can fork, and returns its result.

    A process that has computed with several threads cannot: its child waits for OpenMP's threads forever.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare) as executor:
        return executor.submit(scenario, *arguments).result()


@dataclass(frozen=True)
class Ended:
    """A child's exit code, or minus the signal that killed it, and its output."""

    code: int
    output: str


def run_forked(work: Callable[[], object], log: Path, kill_after: float = HUNG) -> Ended:
    """Runs `work` in a child, which handles a TextmillError as the tools do.

    kill_after: seconds after which the child is killed if it still runs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)
            work()
            code = 0
        except TextmillError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + kill_after
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)
    else:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else "")


def train_forked(data_dir: Path, run_dir: Path, kill_after: float = HUNG, **options: Any) -> Ended:
    """Trains in `run_dir`, or resumes."""
    config = TrainConfig(**(OPTIONS | options))
    return run_forked(lambda: train(config, data_dir, run_dir, resume="auto"), run_dir.with_suffix(".log"), kill_after)


def outcome(run_dir: Path, steps: int = OPTIONS["max_steps"]) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of a run's last checkpoint and its metrics, without rates and times."""
    run, timed = RunFolder(run_dir), {"time", "tokens_per_second", "mfu"}
    lines = [
        {name: value for name, value in line.items() if name not in timed}
        for line in read_metrics(run.metrics)
        if line["kind"] != "checkpoint"
    ]
    return run.checkpoint(steps).read_bytes(), lines
