"""What Dagster costs around the work: `python -m benchmarks.orchestration` prints tables.

A rerun of the whole lineage in which nothing changed, beside jobs of assets that do nothing; and a training, started bare with
torchrun and by the asset `checkpoint`, and with Dagster stopped in between. Each is a process of its own, as a person or CI
starts it, and they take turns.
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
from pipeline.launcher import option_list

ROOT = Path(__file__).parent.parent
DAGSTER = [sys.executable, "-m", "dagster"]
REUSED, NOTHING = "pretrain, everything reused", "four assets that do nothing"
DEFAULT = "the same, a process for each step (Dagster's default)"
SHAPE = "seven assets with ten checks that do nothing"
SHARE = "Dagster's processes while it trains"
BARE, ASSET = "torchrun -m llm_core.train", "the asset checkpoint"
AT_WORK, STOPPED = "Dagster at work", "Dagster stopped"
TURN = 8.0
"""Seconds; more than Dagster's reports of progress are apart."""
WATCHED = 60.0
"""Seconds in which the processors' time is counted: Dagster's records in the catalog are half as far apart."""
MINUTES = 5
"""Length of the training that the share of the orchestration is told for."""

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
    """Seconds of a rerun that changes nothing, of small jobs that do nothing, and of one with as many assets and checks."""
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
    """Seconds of a short training started by hand and by Dagster, whose difference is what its start and its end take."""
    options = _training(steps=60)
    runs = home / "checkpoints"
    _materialize(home, PREPARATION)
    bare = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "llm_core.train"]
    bare += option_list({"data_dir": home / "processed_data", "save_dir": runs / "bare"} | options)

    def anew(start: Callable[[], None]) -> None:
        shutil.rmtree(runs, ignore_errors=True)
        start()

    work: dict[str, Callable[[], object]] = {
        BARE: lambda: anew(lambda: _run(bare, home)),
        ASSET: lambda: anew(lambda: _materialize(home, {"checkpoint": options})),
    }
    return [Figure(name, "s", seconds) for name, seconds in in_turns(rounds, work).items()]


def watched_training(home: Path, pairs: int) -> list[Figure]:
    """One training by Dagster: what Dagster's processes take of the cores, and seconds per step in turns of `TURN` seconds with
    them at work and stopped.

    What they leave while they are stopped they do when they go on: they disturb twice as much as they would otherwise.
    """
    shutil.rmtree(home / "checkpoints", ignore_errors=True)
    command, environment = _materialization({"checkpoint": _training(steps=100_000)}), _environment(home)
    turns: list[tuple[str, float, float]] = []
    family: list[psutil.Process] = []
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not (found := list(home.glob("checkpoints/*/metrics.jsonl"))) or len(found[0].read_bytes()) < 10_000:
                time.sleep(1)
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
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
    times = [line["time"] for line in logged(found[0].parent)["train"]]
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
    """Exactly these assets, with these options."""
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
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description="What Dagster costs around the work.")
    parser.add_argument("--only", choices=["reruns", "training"], help="one of the two tables")
    parser.add_argument("--rounds", type=int, default=7, help="of the reruns")
    parser.add_argument("--training_rounds", type=int, default=5, help="of a short training")
    parser.add_argument("--pairs", type=int, default=12, help="of turns in which Dagster is at work and stopped, in a long one")
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "raw_text_data").mkdir()
        for number, text in enumerate(topics.values()):
            (home / "raw_text_data" / f"topic{number:02}.txt").write_text(text)
        if options.only != "training":
            figures += (found := reruns(home, options.rounds))
            rows = [(one.name, one, f"{one.median / found[1].median:.2f}x") for one in found]
            print(table(["job", "seconds", "ratio"], rows))
        if options.only != "reruns":
            figures += (ends := short_training(home, options.training_rounds))
            print(table(["training of 60 steps", "seconds"], [(one.name, one) for one in ends]))
            figures += (beside := watched_training(home, options.pairs))
            taken, *speeds = beside
            print(table(["while it trains", "seconds per step"], [(one.name, one) for one in speeds]))
            constant = ends[1].median - ends[0].median
            fixed = constant / (60 * MINUTES)
            print(
                f"start and end take {constant:.1f} s, {fixed:.1%} of a training of {MINUTES} minutes; in between Dagster takes "
                f"{taken.median:.1%} of the cores: {fixed + taken.median:.1%} in all. "
                f"Steps are {ratios(*speeds).median - 1:.1%} slower when it works off twice its work"
            )
    path = keep("orchestration", figures, dagster=version("dagster"), duckdb=version("duckdb"))
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
