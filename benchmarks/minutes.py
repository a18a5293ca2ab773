"""How well `train_minutes` keeps its time: `python -m benchmarks.minutes` trains for two budgets on the fairy tales."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data import prepare
from benchmarks.measure import Figure, keep, logged, table
from llm_core.config import ShardConfig, TokenizerConfig
from llm_core.corpus import write_sample_corpus
from llm_core.system import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 4.0], help="budgets (default: 1 4)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        write_sample_corpus(Path(folder) / "tales")
        prepare(Path(folder) / "tales", data_dir, TokenizerConfig(vocab_size=4096), ShardConfig(max_length=256))
        rows, figures = [], []
        for minutes in arguments.minutes:
            run_dir = Path(folder) / f"run_{minutes:g}"
            seconds = _train(data_dir, run_dir, minutes)
            (path,) = run_dir.glob("plan_*.json")
            plan, reached = read_json(path), logged(run_dir)["eval"][-1]["val_bits_per_byte"]
            chosen = plan["options"]
            shape = f"{chosen['num_layers']} x {chosen['hidden_size']}, {chosen['max_steps']} x {chosen['batch_size']}"
            rows.append(
                (f"{minutes:g}", f"{seconds / 60:.2f}", f"{seconds / 60 / minutes:.2f}", shape, f"{plan['bits_per_byte']:.2f}",
                 f"{reached:.3f}")
            )  # fmt: skip
            figures.append(Figure(f"train_minutes {minutes:g}", "of the time asked for", [seconds / 60 / minutes]))
        print(table(["minutes asked", "minutes taken", "ratio", "layers x width, steps x windows", "expected", "reached"], rows))
        print(keep("minutes", figures))


def _train(data_dir: Path, run_dir: Path, minutes: float) -> float:
    """Seconds of the whole command: start, measurement, training and its last checkpoint."""
    options = ["--data_dir", data_dir, "--save_dir", run_dir, "--train_minutes", minutes]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llm_core.train", *map(str, options)], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
