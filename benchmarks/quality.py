"""Time to quality: `python -m benchmarks.quality` trains each contender for the same time on the same text.

The training command by its recipe is compared with itself with AdamW set by hand, with the Trainer of Hugging Face transformers
and a model of the same kind (LlamaForCausalLM), with the Trainer's settings and with textmill's, and, given `--nanochat`, with
nanochat. All take as many steps as fit into the time, so that every schedule reaches its end. They take turns of a few seconds,
one running and the others stopped, so that a slow machine slows all of them. Only the time that a contender runs counts.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.contenders import CONTENDERS, LENGTH, NANOCHATS, RECIPE, Curve, Progress, Training, load_nanochat
from benchmarks.data import prepare
from benchmarks.measure import RESULTS, Figure, keep, table
from benchmarks.technical_text import report_difference, text_digest, write_technical_text
from llm_core.config import ShardConfig, TokenizerConfig
from llm_core.dataset import load_manifest
from llm_core.errors import UserError

TEXT_BYTES, VOCABULARY = 6_000_000, 4096
TARGET = 1.980  # bits per byte
EVALUATIONS, EVAL_TOKENS = 12, 1 << 15
TRIAL_STEPS, TRIAL_EVAL_TOKENS = 60, 1 << 12
TURN, TRIAL_TURN = 20.0, 3.0  # seconds
SAFETY = 0.97  # share of the time to plan for; the rest is a reserve for a slow machine
COLORS = {contender: f"C{number}" for number, contender in enumerate([*CONTENDERS, *NANOCHATS])}

Runs = dict[str, list[Progress]]  # of each contender, one per seed


@dataclass(frozen=True)
class Pace:
    """Seconds of a step and of a validation."""

    step: float
    validation: float

    def steps(self, seconds: float) -> int:
        """The number of steps that fit, a multiple of the number of validations."""
        each = (SAFETY * seconds / EVALUATIONS - self.validation) / self.step
        return EVALUATIONS * max(1, math.floor(each))


def contest(
    folder: Path,
    stage: str,
    steps: Mapping[str, int],
    evaluations: int,
    eval_tokens: int,
    turn: float,
    *,
    seed: int = 0,
    nanochat: Path | None,
) -> dict[str, Progress]:
    """Lets every contender take its steps, `turn` seconds at a time."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    turns: dict[str, list[tuple[float, float]]] = {contender: [] for contender in steps}
    for number, (contender, count) in enumerate(steps.items()):
        options = {"contend": contender, "out": folder / f"{stage}{number}.json", "steps": count}
        options |= {"interval": count // evaluations, "eval_tokens": eval_tokens, "seed": seed}
        if nanochat is not None:
            options["nanochat"] = nanochat
        command = [sys.executable, "-m", "benchmarks.quality", *(f"--{name}={value}" for name, value in options.items())]
        running[contender] = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        os.killpg(running[contender].pid, signal.SIGSTOP)
    while any(process.poll() is None for process in running.values()):
        for contender, process in running.items():
            if process.poll() is None:
                began = time.time()
                os.killpg(process.pid, signal.SIGCONT)
                turns[contender].append((began, _stop_after(process, turn)))
                print(".", end="", flush=True)
    print()
    found = {}
    for number, (contender, process) in enumerate(running.items()):
        if process.returncode:
            raise SystemExit(f"{contender} ended with code {process.returncode}")
        ends, curve = json.loads((folder / f"{stage}{number}.json").read_text())
        found[contender] = Progress(ends, [(at, value) for at, value in curve]).at_work(turns[contender])
    return found


def _stop_after(process: "subprocess.Popen[bytes]", seconds: float) -> float:
    """Stops the process and those it started after so many seconds, or earlier where it ends; returns when that was."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return time.time()
    os.killpg(process.pid, signal.SIGSTOP)
    return time.time()


def pace_of(trial: Progress) -> Pace:
    """Measured over the second half of a short training."""
    ends, curve = trial.ends, trial.curve
    half = len(ends) // 2
    validation = (curve[-1][0] - ends[-1]) * EVAL_TOKENS / TRIAL_EVAL_TOKENS
    return Pace((ends[-1] - ends[half - 1]) / (len(ends) - half), validation)


def seconds_to(curve: Curve, bits_per_byte: float) -> float:
    """When a curve first reaches this value, interpolated between two validations; infinite if it never does."""
    for (before, worse), (after, better) in pairwise(curve):
        if worse <= bits_per_byte:
            return before
        if better <= bits_per_byte:
            return before + (after - before) * (worse - bits_per_byte) / (worse - better)
    return math.inf


def spread(values: Sequence[float], digits: int) -> str:
    """The median, with the lowest and the highest value if there are several; infinite means not reached in this time."""
    texts = [
        "not reached" if math.isinf(value) else f"{value:.{digits}f}"
        for value in (statistics.median(values), min(values), max(values))
    ]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def report(steps: Mapping[str, int], runs: Runs) -> str:
    """The table of all contenders."""
    rows = []
    for contender, found in runs.items():
        ends = [progress.curve[-1] for progress in found]
        row = [contender, f"{steps[contender]:,}", spread([at for at, _ in ends], 0), spread([bits for _, bits in ends], 4)]
        row.append(spread([seconds_to(progress.curve, TARGET) for progress in found], 0))
        if contender == RECIPE:
            rows.append((*row, "", ""))
            continue
        reached = [seconds_to(ours.curve, bits) for ours, (_, bits) in zip(runs[RECIPE], ends, strict=True)]
        shares = [seconds / at for seconds, (at, _) in zip(reached, ends, strict=True)]
        rows.append((*row, spread(reached, 0), spread(shares, 2)))
    header = ["", "steps", "seconds", "bits per byte", f"seconds to {TARGET:.3f}", f"{RECIPE} is there after", "of its time"]
    return table(header, rows)


def draw(runs: Runs, path: Path) -> None:
    """Bits per byte over minutes of training, one line per seed."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for name, found in runs.items():
        final = statistics.median(progress.curve[-1][1] for progress in found)
        for number, progress in enumerate(found):
            axes.plot([at / 60 for at, _ in progress.curve], [value for _, value in progress.curve], color=COLORS[name],
                      marker="o", markersize=3, label="" if number else f"{name}: {final:.3f}")  # fmt: skip
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_ylim(bottom=0.95 * min(value for found in runs.values() for progress in found for _, value in progress.curve))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    picture.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Quality reached in the same training time."
    )
    parser.add_argument("--seconds", type=float, default=120, help="training time of each contender")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other weights and another order of the windows")
    parser.add_argument("--nanochat", type=Path, help="checkout of github.com/karpathy/nanochat, to compare with it too")
    parser.add_argument("--contend", choices=[*CONTENDERS, *NANOCHATS], help=argparse.SUPPRESS)
    for name, kind in {"out": Path, "steps": int, "interval": int, "eval_tokens": int, "seed": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        training = Training(
            options.out.parent / "data", options.steps, options.interval, options.eval_tokens, options.seed, options.nanochat
        )
        progress = training.run(options.contend, options.out.with_suffix(""))
        options.out.write_text(json.dumps([progress.ends, progress.curve]))
        return
    if options.seeds < 1 or options.seconds <= 0:
        parser.error(f"seeds {options.seeds}, seconds {options.seconds:g}: give positive numbers")
    contenders = list(CONTENDERS)
    if options.nanochat is not None:
        try:
            load_nanochat(options.nanochat)
        except UserError as error:
            parser.error(str(error))
        contenders += NANOCHATS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, data_dir = folder / "raw", folder / "data"
        write_technical_text(raw, TEXT_BYTES)
        prepare(raw, data_dir, TokenizerConfig(vocab_size=VOCABULARY), ShardConfig(max_length=LENGTH))
        print(f"{load_manifest(data_dir).splits['train'].tokens:,} training tokens", flush=True)
        trial_steps = dict.fromkeys(contenders, TRIAL_STEPS)
        trials = contest(folder, "trial", trial_steps, 1, TRIAL_EVAL_TOKENS, TRIAL_TURN, nanochat=options.nanochat)
        steps = {contender: pace_of(trial).steps(options.seconds) for contender, trial in trials.items()}
        runs: Runs = {contender: [] for contender in contenders}
        for seed in range(options.seeds):
            found = contest(folder, f"run{seed}_", steps, EVALUATIONS, EVAL_TOKENS, TURN, seed=seed, nanochat=options.nanochat)
            for contender, progress in found.items():
                runs[contender].append(progress)
        digest = text_digest(raw)
        print("\n" + report(steps, runs) + "\n")
        report_difference(raw)
    draw(runs, RESULTS / "quality.png")
    for contender, repeated in runs.items():
        for seed, progress in enumerate(repeated):
            figure = Figure(contender, "bits per byte", [value for _, value in progress.curve])
            seconds = [round(at, 1) for at, _ in progress.curve]
            path = keep("quality", [figure], text_sha256=digest, seed=seed, steps=steps[contender], seconds=seconds)
    print(f"\nappended to {path}, drawn in {RESULTS / 'quality.png'}")


if __name__ == "__main__":
    main()
