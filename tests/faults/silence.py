"""Ranks that say nothing any more: stopped, or behind a cable that was cut. The others notice within `--collective_timeout`."""

import json
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

from tests.faults.kills import problem_of_resuming, torchrun, uninterrupted
from tests.faults.processes import wait_for_a_step
from tests.faults.report import Tally
from tests.llm_core.two_nodes import STATIC, TwoNodes

TIMEOUT = 15
"""Seconds: `--collective_timeout` of the disturbed runs."""

GRACE = 60
"""Seconds on top, for torchrun's own ending and a busy machine."""


def stop_a_rank(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """SIGSTOP to one of two ranks; then the command again, without the fault."""
    tally = Tally("torchrun with two ranks, SIGSTOP", seed)
    chosen = random.Random(seed)
    whole, _ = uninterrupted(data_dir)
    for trial in range(trials):
        run_dir, stopped = folder / f"run{trial}", f"rank {trial % 2}"
        with torchrun(data_dir, run_dir, shutdown_timeout=5, collective_timeout=TIMEOUT) as command:
            wait_for_a_step(command, run_dir)
            time.sleep(chosen.uniform(0, 0.3))
            command.signal(signal.SIGSTOP, stopped)
            code, left = command.wait(TIMEOUT + GRACE), command.left(GRACE)
        said = command.output()
        if code in (None, 0) or left or f"{TIMEOUT}000ms" not in said:
            problem: str | None = f"ended with {code}, left {left}: {said[-1000:]}"
        else:
            problem = problem_of_resuming(data_dir, run_dir, whole)
        tally.count(problem and f"{stopped} stopped: {problem}")
    return tally


def cut_the_cable(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Two machines as network namespaces; the link between them goes down. Needs root."""
    tally = Tally("two machines, their link cut", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        place = folder / f"trial{trial}"
        place.mkdir()
        nodes = TwoNodes(place)
        try:
            nodes.connect()
            for node in range(2):
                meeting = (*STATIC, f"--node_rank={node}")
                nodes.start(node, meeting, data_dir, place / f"node{node}", max_steps=10**7, collective_timeout=TIMEOUT)
            nodes.wait_for_steps(place / "node0")
            time.sleep(chosen.uniform(0, 1))
            nodes.cut_cable()
            codes = [nodes.wait(node, TIMEOUT + GRACE) for node in range(2)]
            run = json.loads((place / "node0/run.json").read_text())
            fine = min(codes) > 0 and run["status"] == "failed" and f"{TIMEOUT}000ms" in run["error"]
            tally.count(None if fine else f"they ended with {codes}, {run['status']}: {run['error']}")
        except AssertionError as error:
            tally.count(str(error))
        finally:
            with suppress(FileNotFoundError):
                nodes.remove()
    return tally
