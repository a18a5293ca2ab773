"""SIGINT and SIGTERM at every level, on a slow disk, twice: the training saves, ends in order and resumes to the same bits."""

import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from llm_core.checkpoint import RunRecord, newest_valid
from llm_core.layout import Home, RunFolder
from llm_core.training import read_metrics
from tests.faults.kills import problem_of_resuming, torchrun, undisturbed
from tests.faults.processes import Command, wait_for_a_step, wait_until
from tests.faults.report import Tally
from tests.faults.steps import DagsterHome, differences, undisturbed_home

# As sitecustomize.py, Python runs this first in every process: each write of a checkpoint takes a second longer.
_SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    if "checkpoint_step" in os.readlink(f"/proc/self/fd/{descriptor}"):
        time.sleep(1)
    fsync(descriptor)
os.fsync = slow
"""


def cancel_torchrun(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """The documented command with two ranks; the signal goes to a rank, to torchrun or to all processes, as from a terminal."""
    tally = Tally("torchrun with two ranks, SIGINT or SIGTERM", seed)
    chosen = random.Random(seed)
    expected, _ = undisturbed(data_dir)
    slow = _slow_disk(folder)
    for trial in range(trials):
        run_dir = folder / f"run{trial}"
        target, twice, environment = (
            chosen.choice(["rank 0", "rank 1", "torchrun", "all"]),
            trial % 2 == 1,
            slow if trial % 3 != 1 else {},
        )
        with torchrun(data_dir, run_dir, environment=environment) as command:
            problem = _cancel(command, target, twice, run_dir, chosen)
        if problem is None:
            problem = problem_of_resuming(data_dir, run_dir, expected)
        tally.count(problem and f"{target}{', twice' * twice}{', slow disk' * bool(environment)}: {problem}")
    return tally


def cancel_dagster_steps(corpus_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """`dagster job execute`; the signal goes to the command, to torchrun or to a rank."""
    tally = Tally("dagster job execute, SIGINT or SIGTERM", seed)
    chosen = random.Random(seed)
    expected = undisturbed_home(corpus_dir)
    slow = _slow_disk(folder)
    for trial in range(trials):
        home = DagsterHome(corpus_dir, folder / f"trial{trial}")
        target = ["command", "torchrun", "command", "rank 0"][trial % 4]
        twice, environment = trial % 4 < 2, slow if trial % 3 != 1 else {}
        run_dir = Home(home.root).run(expected.run_id).root
        with home.execute(**environment) as command:
            problem = _cancel(command, target, twice, run_dir, chosen)
        if problem is None:
            with home.execute() as command:
                code = command.wait()
            problem = differences(expected.outcome, home.outcome())
            if code != 0:
                problem = f"exit code {code} after the resume: {command.output()[-1000:]}"
        tally.count(problem and f"{target}{', twice' * twice}{', slow disk' * bool(environment)}: {problem}")
        shutil.rmtree(folder / f"trial{trial}")
    return tally


def _cancel(command: Command, target: str, twice: bool, run_dir: Path, chosen: random.Random) -> str | None:
    """Sends the signals after the first step. Returns what went wrong, None if nothing did."""
    if not wait_for_a_step(command, run_dir):
        return f"no first step: {command.output()[-2000:]}"
    time.sleep(chosen.uniform(0, 0.5))
    command.signal(chosen.choice([signal.SIGINT, signal.SIGTERM]), target)
    if twice:
        wait_until(lambda: bool(list(run_dir.glob(".checkpoint*.tmp"))), command, 5)
        command.signal(chosen.choice([signal.SIGINT, signal.SIGTERM]), target)
    code, left = command.wait(), command.left()
    if code is None or left:
        return f"exit code {code}, left behind {left}"
    run = RunRecord.read(run_dir)
    if run.status == "finished":  # the signal arrived after the last step
        return None
    newest, _ = newest_valid(run_dir)
    last_step = max(line["step"] for line in read_metrics(RunFolder(run_dir).metrics) if line["kind"] == "train")
    if run.status != "preempted" or newest is None or newest.step != last_step:
        saved = newest.step if newest else None
        return f"status {run.status}, saved step {saved} of {last_step}: {command.output()[-2000:]}"
    return None if code else "a stopped training exited with 0"


def _slow_disk(folder: Path) -> Mapping[str, str]:
    """Environment variables that make checkpoints slow to write."""
    modules = folder / "slow_disk"
    modules.mkdir(exist_ok=True)
    (modules / "sitecustomize.py").write_text(_SLOW_DISK)
    return {"PYTHONPATH": str(modules)}
