"""`python -m benchmarks.command` measures how fast the training command starts, saves and trains on several ranks.

It runs `python -m llm_core.train`, alone or under torchrun: the preset tiny with a vocabulary of 32,000 and windows of 512
tokens, on text of the Python installation.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import prepare_corpus
from benchmarks.measure import CORES, Figure, keep, logged, table
from llm_core.checkpoint import RunRecord
from llm_core.config import ShardConfig, TokenizerConfig

MEGABYTES = 20
STEPS = 12
SAVES = 4  # the command waits for the last one


@dataclass(frozen=True)
class Run:
    """Timings of one run of the command."""

    start: float  # seconds from the command to its first step
    tokens_per_second: float
    saving: float  # seconds that the training waited for checkpoints


def run(data_dir: Path, run_dir: Path, ranks: int, *flags: str) -> Run:
    """Runs the command once."""
    module = ["-m", "llm_core.train"]
    if ranks > 1:
        module = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *module]
    options = [f"--data_dir={data_dir}", f"--save_dir={run_dir}", f"--max_steps={STEPS}", "--eval_tokens=512", *flags]
    began = time.time()
    subprocess.run([sys.executable, *module, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    train = logged(run_dir)["train"]
    first, second = (record["time"] for record in train[:2])
    # The first step counts as long as the second. It takes longer, so the start is overestimated, if anything.
    saving = RunRecord.read(run_dir).seconds_by_phase["save"]
    return Run(first - (second - first) - began, train[-1]["tokens_per_second"], saving)


def measure(data_dir: Path, folder: Path, rounds: int) -> list[Figure]:
    """Runs the command in every way once per round."""
    saves = f"--save_interval={STEPS // SAVES}"
    kinds: dict[str, tuple[int, tuple[str, ...]]] = {
        "one rank": (1, ("--save_interval=0",)),
        f"{CORES} ranks": (CORES, ("--save_interval=0",)),
        "saves in the background": (1, (saves,)),
        "saves in the foreground": (1, (saves, "--no-background_save")),
    }
    measured: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (ranks, flags) in kinds.items():
            with tempfile.TemporaryDirectory(dir=folder) as run_dir:
                measured[kind].append(run(data_dir, Path(run_dir), ranks, *flags))
            print(".", end="", flush=True)
    print()
    written = [one.saving / SAVES for one in measured["saves in the foreground"]]
    blocked = [(one.saving - last) / (SAVES - 1) for one, last in zip(measured["saves in the background"], written, strict=True)]
    return [
        *(Figure(f"start, {kind}", "s", [one.start for one in measured[kind]]) for kind in list(kinds)[:2]),
        *(Figure(kind, "tokens/s", [one.tokens_per_second for one in measured[kind]]) for kind in list(kinds)[:2]),
        Figure("checkpoint, written", "s", written),
        Figure("checkpoint, training waits", "s", blocked),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.command", description="Start, checkpoints and ranks of the training command."
    )
    parser.add_argument("--corpus", type=Path, help="folder of .py, .txt, .md and .rst files; default: the Python installation")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = prepare_corpus(options.corpus, MEGABYTES, folder, TokenizerConfig(), ShardConfig(max_length=512))
        figures = measure(data_dir, folder, options.rounds)
    print("\n" + table(["", "", ""], [(figure.name, figure, figure.unit) for figure in figures]))
    one, several, written, waits = (figure.median for figure in figures[2:])
    print(f"\n{CORES} ranks: {several / one:.2f}x the speed of one rank with {CORES} threads")
    print(f"the training waits for {waits / written:.0%} of the time it takes to write a checkpoint")
    print(f"appended to {keep('command', figures)}")


if __name__ == "__main__":
    main()
