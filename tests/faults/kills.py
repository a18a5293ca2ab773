"""SIGKILL at random moments: what is run again afterwards ends as if nothing had happened, to the bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.faults.forks import outcome, train_forked
from tests.faults.report import Tally
from tests.llm_core.training import run_train, train_arguments

RANKS_OPTIONS: dict[str, Any] = {
    "max_steps": 300,
    "save_interval": 20,
    "eval_interval": 100,
    "keep_checkpoints": 3,
    "resume": "auto",
}


def kill_the_training_process(data_dir: Path, folder: Path, kills: int, seed: int) -> Tally:
    """One process, killed again and again until its run is done; then the next run, until there were enough kills."""
    tally = Tally("training process, SIGKILL", seed)
    random_moment = random.Random(seed)
    began = time.monotonic()
    assert train_forked(data_dir, folder / "whole").code == 0
    duration = time.monotonic() - began
    whole = outcome(folder / "whole")
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
                problem = f"{run_dir.name}: ended with {ended.code}: {ended.output[-500:]}"
            elif outcome(run_dir) != whole:
                problem = f"{run_dir.name}: the weights or the logged losses differ"
            elif left := [path.name for path in run_dir.glob(".*.tmp")]:
                problem = f"{run_dir.name}: left behind {left}"
            for _ in range(pending):
                tally.count(problem)
            shutil.rmtree(run_dir)
            break
    return tally


def kill_two_ranks(data_dir: Path, folder: Path, kills: int, seed: int) -> Tally:
    """The documented command with two ranks; a rank, torchrun or all of them are killed."""
    tally = Tally("torchrun with two ranks, SIGKILL", seed)
    chosen = random.Random(seed)
    began = time.monotonic()
    run_train(data_dir, folder / "whole", 2, **RANKS_OPTIONS)
    duration = time.monotonic() - began
    whole = outcome(folder / "whole", RANKS_OPTIONS["max_steps"])
    while tally.injected < kills:
        run_dir = folder / f"run{tally.injected}"
        pending: list[str | None] = []
        while True:
            target, moment = chosen.choice(["rank 0", "rank 1", "torchrun", "all"]), chosen.uniform(0.3, 1.1) * duration
            code, orphans = _torchrun(data_dir, run_dir, target, moment)
            if code is None:
                pending.append(f"{target} killed after {moment:.2f} s: processes {orphans} were left" if orphans else None)
                continue
            problem = f"{run_dir.name}: ended with {code}" if code else None
            if code == 0 and outcome(run_dir, RANKS_OPTIONS["max_steps"]) != whole:
                problem = f"{run_dir.name}: the weights or the logged losses differ"
            for orphaned in pending:
                tally.count(orphaned or problem)
            shutil.rmtree(run_dir)
            break
    return tally


def _torchrun(data_dir: Path, run_dir: Path, target: str, moment: float) -> tuple[int | None, list[int]]:
    """Runs the command and kills `target` after `moment` seconds.

    Returns:
        The exit code where the run ended by itself before that, else None; and the processes that outlived the kill by a minute.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        *train_arguments(data_dir, run_dir, **RANKS_OPTIONS),
    ]
    with open(run_dir.with_suffix(".log"), "wb") as log:
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        return torchrun.wait(moment), []
    except subprocess.TimeoutExpired:
        pass
    family = psutil.Process(torchrun.pid).children(recursive=True)
    ranks = [process for process in family if "llm_core.train" in " ".join(_command(process))]
    victims = {"torchrun": [], "all": ranks}.get(target, ranks[-1:] if target == "rank 1" else ranks[:1])
    if target in ("torchrun", "all") or not victims:
        victims = [*victims, psutil.Process(torchrun.pid)]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    try:
        torchrun.wait(60)
    except subprocess.TimeoutExpired:
        torchrun.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    for orphan in alive:
        orphan.kill()
    return None, [orphan.pid for orphan in alive]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
