"""SIGKILL at random moments: the rerun gives the same bits as an undisturbed run."""

import random
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.forks import outcome, train_forked
from tests.faults.processes import Command
from tests.faults.report import Tally
from tests.support.training import run_train, train_arguments

RANKS_OPTIONS: dict[str, Any] = {
    "max_steps": 300,
    "save_interval": 20,
    "eval_interval": 100,
    "keep_checkpoints": 3,
    "resume": "auto",
}


def kill_the_training_process(data_dir: Path, folder: Path, kills: int, seed: int) -> Tally:
    """One process, killed and restarted until its run finishes; then the next run, until there are enough kills."""
    tally = Tally("training process, SIGKILL", seed)
    random_moment = random.Random(seed)
    began = time.monotonic()
    assert train_forked(data_dir, folder / "undisturbed").code == 0
    duration = time.monotonic() - began
    expected = outcome(folder / "undisturbed")
    while tally.injected < kills:
        run_dir = folder / f"run{tally.injected}"
        pending = 0
        while True:
            ended = train_forked(data_dir, run_dir, kill_after=random_moment.uniform(0, 1.2 * duration))
            if ended.code == -signal.SIGKILL:
                pending += 1
                continue
            problem = None
            if ended.code != 0:
                problem = f"{run_dir.name}: exit code {ended.code}: {ended.output[-500:]}"
            elif outcome(run_dir) != expected:
                problem = f"{run_dir.name}: the weights or the logged losses differ"
            elif left := [path.name for path in run_dir.glob(".*.tmp")]:
                problem = f"{run_dir.name}: left behind {left}"
            for _ in range(pending):
                tally.count(problem)
            shutil.rmtree(run_dir)
            break
    return tally


def kill_two_ranks(data_dir: Path, folder: Path, kills: int, seed: int) -> Tally:
    """The documented command with two ranks; a rank, torchrun or all processes are killed."""
    tally = Tally("torchrun with two ranks, SIGKILL", seed)
    chosen = random.Random(seed)
    expected, duration = undisturbed(data_dir)
    while tally.injected < kills:
        run_dir = folder / f"run{tally.injected}"
        pending: list[str | None] = []
        while True:
            target, moment = chosen.choice(["rank 0", "rank 1", "torchrun", "all"]), chosen.uniform(0.3, 1.1) * duration
            code, orphans = _kill_torchrun(data_dir, run_dir, target, moment)
            if code is None:
                pending.append(f"{target} killed after {moment:.2f} s: left behind {orphans}" if orphans else None)
                continue
            problem = f"{run_dir.name}: exit code {code}" if code else None
            if code == 0 and outcome(run_dir, RANKS_OPTIONS["max_steps"]) != expected:
                problem = f"{run_dir.name}: the weights or the logged losses differ"
            for orphaned in pending:
                tally.count(orphaned or problem)
            shutil.rmtree(run_dir)
            break
    return tally


@cache
def undisturbed(data_dir: Path) -> tuple[object, float]:
    """The outcome of the undisturbed command, and how many seconds it takes."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run_train(data_dir, Path(folder), 2, **RANKS_OPTIONS)
        return outcome(Path(folder), RANKS_OPTIONS["max_steps"]), time.monotonic() - began


def torchrun(
    data_dir: Path,
    run_dir: Path,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    shutdown_timeout: int = 60,
    **options: Any,
) -> Command:
    """Starts the documented command with two ranks; shutdown_timeout: seconds in which they can save when stopped."""
    run_dir.mkdir(parents=True, exist_ok=True)
    train = train_arguments(data_dir, run_dir, **(RANKS_OPTIONS | options))
    arguments = ["torch.distributed.run", "--nproc_per_node=2", f"--shutdown-timeout={shutdown_timeout}", *train]
    return Command(arguments, log or run_dir.with_suffix(".log"), environment)


def problem_of_resuming(data_dir: Path, run_dir: Path, expected: object) -> str | None:
    """Runs the command again. Returns what was lost, None if its outcome is the expected one."""
    with torchrun(data_dir, run_dir) as command:
        code = command.wait()
    if code != 0:
        return f"exit code {code} after the resume: {command.output()[-1000:]}"
    return None if outcome(run_dir, RANKS_OPTIONS["max_steps"]) == expected else "the weights or the logged losses differ"


def _kill_torchrun(data_dir: Path, run_dir: Path, target: str, moment: float) -> tuple[int | None, list[str]]:
    """Runs the command and kills `target` after `moment` seconds.

    Returns:
        The exit code if the run ended before that, else None; and the processes that outlived the kill.
    """
    with torchrun(data_dir, run_dir) as command:
        code = command.wait(moment)
        if code is None:
            command.signal(signal.SIGKILL, target)
            command.wait()
        return code, command.left()
