"""Silent ranks: stopped, or behind a cut cable. The others notice within `--collective_timeout`."""

import random
import signal
import time
from contextlib import suppress
from pathlib import Path

from llm_core.checkpoint import RunRecord
from tests.faults.kills import problem_of_resuming, torchrun, undisturbed
from tests.faults.processes import wait_for_a_step
from tests.faults.report import Tally
from tests.support.two_nodes import STATIC, TwoNodes

# Seconds, `--collective_timeout` of the disturbed runs.
TIMEOUT = 15

# Extra seconds for torchrun to end and for a busy machine.
GRACE = 60


def stop_a_rank(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """SIGSTOP to one of two ranks; then the command is run again without the fault."""
    tally = Tally("torchrun with two ranks, SIGSTOP", seed)
    chosen = random.Random(seed)
    expected, _ = undisturbed(data_dir)
    for trial in range(trials):
        run_dir, stopped = folder / f"run{trial}", f"rank {trial % 2}"
        with torchrun(data_dir, run_dir, shutdown_timeout=5, collective_timeout=TIMEOUT) as command:
            wait_for_a_step(command, run_dir)
            time.sleep(chosen.uniform(0, 0.3))
            command.signal(signal.SIGSTOP, stopped)
            code, left = command.wait(TIMEOUT + GRACE), command.left(GRACE)
        output = command.output()
        if code in (None, 0) or left or f"{TIMEOUT}000ms" not in output:
            problem: str | None = f"exit code {code}, left behind {left}: {output[-1000:]}"
        else:
            problem = problem_of_resuming(data_dir, run_dir, expected)
        tally.count(problem and f"{stopped} stopped: {problem}")
    return tally


def cut_the_cable(data_dir: Path, folder: Path, trials: int, seed: int) -> Tally:
    """Two machines, simulated as network namespaces; the link between them goes down. Needs root."""
    tally = Tally("two machines, their link cut", seed)
    chosen = random.Random(seed)
    for trial in range(trials):
        place = folder / f"trial{trial}"
        place.mkdir()
        nodes = TwoNodes(place)
        try:
            nodes.connect()
            for node in range(2):
                rendezvous = (*STATIC, f"--node_rank={node}")
                nodes.start(node, rendezvous, data_dir, place / f"node{node}", max_steps=10**7, collective_timeout=TIMEOUT)
            nodes.wait_for_steps(place / "node0")
            time.sleep(chosen.uniform(0, 1))
            nodes.cut_cable()
            codes = [nodes.wait(node, TIMEOUT + GRACE) for node in range(2)]
            run = RunRecord.read(place / "node0")
            expected = min(codes) > 0 and run.status == "failed" and f"{TIMEOUT}000ms" in str(run.error)
            tally.count(None if expected else f"exit codes {codes}, {run.status}: {run.error}")
        except AssertionError as error:
            tally.count(str(error))
        finally:
            with suppress(FileNotFoundError):
                nodes.remove()
    return tally
