"""The overhead of Dagster: `python -m benchmarks.orchestration` prints tables.

A rerun of an unchanged lineage, compared with jobs whose assets do nothing; a training under plain torchrun and by the asset
`checkpoint`; and a training with Dagster running and stopped in turns. Each runs in its own process, as in CI.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil

from benchmarks.measure import CORES, Figure, in_turns, keep, logged, ratios, table
from llm_core.layout import Home
from pipeline.processes.tools import option_list

ROOT = Path(__file__).parent.parent
DAGSTER = [sys.executable, "-m", "dagster"]
REUSED, NOTHING = "pretrain, everything reused", "four assets that do nothing"
DEFAULT = "the same, a process for each step (Dagster's default)"
SHAPE = "seven assets with ten checks that do nothing"
SHARE = "Dagster's processes while it trains"
BARE, ASSET = "torchrun -m llm_core.train", "the asset checkpoint"
AT_WORK, STOPPED = "Dagster at work", "Dagster stopped"
# Seconds; longer than the interval of Dagster's progress reports.
TURN = 8.0
# Seconds over which CPU time is counted: twice the interval at which metrics are recorded in the catalog.
WATCHED = 60.0
# Length of the training for which the overhead is printed.
MINUTES = 5

NOTHING_TO_DO = """
import dagster as dg


def assets(names, checks):
    passed = [dg.AssetCheckResult(passed=True, check_name=f"check_{number}") for number in range(checks)]
    made = []
    for name in names:
        specs = [dg.AssetCheckSpec(result.check_name, asset=name) for result in passed]

        @dg.asset(name=name, deps=made[-1:], check_specs=specs)
        def nothing():
            return dg.MaterializeResult(check_results=passed)

        made.append(nothing)
    return made


four = assets(["first", "second", "third", "fourth"], checks=0)
shape = [*assets(["a", "b", "c", "d", "e"], checks=2), *assets(["f", "g"], checks=0)]
jobs = [
    dg.define_asset_job(name, selection=chosen, executor_def=dg.in_process_executor)
    for name, chosen in {"four": four, "shape": shape}.items()
]
jobs.append(dg.define_asset_job("default", selection=four))
defs = dg.Definitions(assets=[*four, *shape], jobs=jobs)
"""
PREPARATION: dict[str, dict[str, Any]] = {
    "raw_text": {},
    "trained_tokenizer": {"vocab_size": 1024},
    "tokenized_shards": {"max_length": 256, "num_workers": 1},
}
TRAINING = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "batch_size": 4, "eval_tokens": 16384, "device": "cpu"}


def reruns(home: Path, rounds: int) -> list[Figure]:
    """Seconds of a rerun without changes, and of jobs that do nothing (one has as many assets and checks as `pretrain`)."""
    module = home / "nothing.py"
    module.write_text(NOTHING_TO_DO)
    pretrain = [*DAGSTER, "job", "execute", "-m", "pipeline.definitions", "-j", "pretrain", "-c", "configs/smoke.yaml"]
    work: dict[str, Callable[[], object]] = {
        REUSED: lambda: _run(pretrain, home),
        NOTHING: lambda: _run([*DAGSTER, "job", "execute", "-f", str(module), "-j", "four"], home),
        DEFAULT: lambda: _run([*DAGSTER, "job", "execute", "-f", str(module), "-j", "default"], home),
        SHAPE: lambda: _run([*DAGSTER, "job", "execute", "-f", str(module), "-j", "shape"], home),
    }
    _run(pretrain, home)
    return [Figure(name, "s", seconds) for name, seconds in in_turns(rounds, work).items()]


def short_training(home: Path, rounds: int) -> list[Figure]:
    """Seconds of a short training under torchrun and under Dagster; the difference is the overhead at its start and end."""
    options = _training(steps=60)
    runs = Home(home).checkpoints
    _materialize(home, PREPARATION)
    bare = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "llm_core.train"]
    bare += option_list({"data_dir": Home(home).prepared.root, "save_dir": runs / "bare"} | options)

    def from_scratch(start: Callable[[], None]) -> None:
        shutil.rmtree(runs, ignore_errors=True)
        start()

    work: dict[str, Callable[[], object]] = {
        BARE: lambda: from_scratch(lambda: _run(bare, home)),
        ASSET: lambda: from_scratch(lambda: _materialize(home, {"checkpoint": options})),
    }
    return [Figure(name, "s", seconds) for name, seconds in in_turns(rounds, work).items()]


def watched_training(home: Path, pairs: int) -> list[Figure]:
    """One training by Dagster: the share of the cores that Dagster's processes use, and seconds per step, in turns of `TURN`
    seconds with these processes running and stopped.

    They catch up after each stop, so that they slow the training twice as much as usual.
    """
    shutil.rmtree(Home(home).checkpoints, ignore_errors=True)
    command, environment = _materialization({"checkpoint": _training(steps=100_000)}), _environment(home)
    turns: list[tuple[str, float, float]] = []
    family: list[psutil.Process] = []
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not (runs := Home(home).runs()) or not runs[0].metrics.exists() or runs[0].metrics.stat().st_size < 10_000:
                time.sleep(1)
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            (torchrun,) = (member for member in family if "torch.distributed.run" in member.cmdline() and member.children())
            dagster = [member for member in family if member not in (torchrun, *torchrun.children(recursive=True))]
            began, spent = time.monotonic(), _processor_seconds(dagster)
            time.sleep(WATCHED)
            share = (_processor_seconds(dagster) - spent) / (time.monotonic() - began) / CORES
            for turn in range(2 * pairs):
                name, request = (AT_WORK, signal.SIGCONT) if turn % 2 else (STOPPED, signal.SIGSTOP)
                for member in dagster:
                    member.send_signal(request)
                began = time.time()
                time.sleep(TURN)
                turns.append((name, began, time.time()))
        finally:
            for member in family:
                member.kill()
            process.kill()
    times = [line["time"] for line in logged(runs[0].root)["train"]]
    seconds: dict[str, list[float]] = {AT_WORK: [], STOPPED: []}
    for name, began, ended in turns:
        within = [moment for moment in times if began < moment < ended]
        seconds[name].append((within[-1] - within[0]) / (len(within) - 1))
    return [Figure(SHARE, "of the cores", [share]), *(Figure(name, "s per step", values) for name, values in seconds.items())]


def _processor_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _training(steps: int) -> dict[str, Any]:
    return TRAINING | {"max_steps": steps, "eval_interval": 0, "save_interval": 0}


def _materialize(home: Path, options: dict[str, dict[str, Any]]) -> None:
    """Materializes these assets with these options."""
    _run(_materialization(options), home)


def _materialization(options: dict[str, dict[str, Any]]) -> list[str]:
    config = json.dumps({"ops": {name: {"config": values} for name, values in options.items()}})
    selected = ["--select", ",".join(options), "--config-json", config]
    return [*DAGSTER, "asset", "materialize", "-m", "pipeline.definitions", *selected]


def _environment(home: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"} | {"TEXTMILL_HOME": str(home)}


def _run(command: list[str], home: Path) -> None:
    done = subprocess.run(command, env=_environment(home), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description="The overhead of Dagster.")
    parser.add_argument("--only", choices=["reruns", "training"], help="print only one part")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the reruns")
    parser.add_argument("--training_rounds", type=int, default=5, help="rounds of the short training")
    parser.add_argument(
        "--pairs", type=int, default=12, help="pairs of turns of the long training, with Dagster running and stopped"
    )
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        Home(home).raw_text.mkdir()
        for number, text in enumerate(topics.values()):
            (Home(home).raw_text / f"topic{number:02}.txt").write_text(text)
        if options.only != "training":
            figures += (jobs := reruns(home, options.rounds))
            rows = [(one.name, one, f"{one.median / jobs[1].median:.2f}x") for one in jobs]
            print(table(["job", "seconds", "ratio"], rows))
        if options.only != "reruns":
            figures += (ends := short_training(home, options.training_rounds))
            print(table(["training of 60 steps", "seconds"], [(one.name, one) for one in ends]))
            figures += (watched := watched_training(home, options.pairs))
            share, *speeds = watched
            print(table(["while it trains", "seconds per step"], [(one.name, one) for one in speeds]))
            constant = ends[1].median - ends[0].median
            fixed = constant / (60 * MINUTES)
            print(
                f"start and end take {constant:.1f} s, {fixed:.1%} of a training of {MINUTES} minutes; in between, Dagster uses "
                f"{share.median:.1%} of the cores: {fixed + share.median:.1%} in total. "
                f"Steps are {ratios(*speeds).median - 1:.1%} slower while it does twice its usual work"
            )
    path = keep("orchestration", figures, dagster=version("dagster"), duckdb=version("duckdb"))
    print(f"appended to {path}")


if __name__ == "__main__":
    main()
