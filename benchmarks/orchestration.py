"""What Dagster costs around the work: `python -m benchmarks.orchestration` prints two tables.

A rerun of the whole lineage in which nothing changed, beside jobs of assets that do nothing; and one training, started
bare with torchrun and by the asset `checkpoint`. Each is a process of its own, as a person or CI starts it, and they take turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.measure import Figure, in_turns, keep, table
from llm_core.runlog import read_metrics
from pipeline.launcher import option_list

ROOT = Path(__file__).parent.parent
DAGSTER = [sys.executable, "-m", "dagster"]
REUSED, NOTHING = "pretrain, everything reused", "four assets that do nothing"
DEFAULT = "the same, a process for each step (Dagster's default)"
SHAPE = "seven assets with ten checks that do nothing"
BARE, ASSET = "torchrun -m llm_core.train", "the asset checkpoint"
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


def training(home: Path, rounds: int, steps: int) -> list[Figure]:
    """Seconds and tokens per second of the same training, started by hand and by Dagster."""
    options = TRAINING | {"max_steps": steps, "eval_interval": steps // 2, "save_interval": steps // 2}
    runs = home / "checkpoints"
    _materialize(home, PREPARATION)
    bare = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "-m", "llm_core.train"]
    bare += option_list({"data_dir": home / "processed_data", "save_dir": runs / "bare"} | options)
    speeds: dict[str, list[float]] = {BARE: [], ASSET: []}

    def timed(name: str, start: Callable[[], None]) -> None:
        shutil.rmtree(runs, ignore_errors=True)
        start()
        (metrics,) = runs.glob("*/metrics.jsonl")
        steady = [line["tokens_per_second"] for line in read_metrics(metrics) if line["kind"] == "train"]
        speeds[name].append(statistics.median(speed for speed in steady if speed))

    work: dict[str, Callable[[], object]] = {
        BARE: lambda: timed(BARE, lambda: _run(bare, home)),
        ASSET: lambda: timed(ASSET, lambda: _materialize(home, {"checkpoint": options})),
    }
    seconds = in_turns(rounds, work, uncounted=0)  # a training is long, and warms itself up
    return [
        *(Figure(name, "s", values) for name, values in seconds.items()),
        *(Figure(name, "tokens/s", values) for name, values in speeds.items()),
    ]


def _materialize(home: Path, options: dict[str, dict[str, Any]]) -> None:
    """Exactly these assets, with these options."""
    config = json.dumps({"ops": {name: {"config": values} for name, values in options.items()}})
    selected = ["--select", ",".join(options), "--config-json", config]
    _run([*DAGSTER, "asset", "materialize", "-m", "pipeline.definitions", *selected], home)


def _run(command: list[str], home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"} | {"TEXTMILL_HOME": str(home)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description="What Dagster costs around the work.")
    parser.add_argument("--only", choices=["reruns", "training"], help="one of the two tables")
    parser.add_argument("--rounds", type=int, default=7, help="of the reruns")
    parser.add_argument("--training_rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300, help="of the training")
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
            figures += (found := training(home, options.training_rounds, options.steps))
            print(
                table(
                    [f"training, {options.steps} steps", "seconds", "tokens/s"],
                    list(zip((BARE, ASSET), found[:2], found[2:], strict=True)),
                )
            )
            print(f"of a training of {MINUTES} minutes, Dagster's part is {share(found):.2%}")
    path = keep("orchestration", figures, steps=options.steps, dagster=version("dagster"), duckdb=version("duckdb"))
    print(f"kept in {path}")


def share(found: list[Figure]) -> float:
    """The part that grows with the steps, told by the speeds, and the constant rest of the difference, on a longer training."""
    bare, asset, bare_speed, asset_speed = (figure.median for figure in found)
    slower = max(0.0, bare_speed / asset_speed - 1)
    constant = asset - bare * (1 + slower)
    return slower + constant / (60 * MINUTES)


if __name__ == "__main__":
    main()
