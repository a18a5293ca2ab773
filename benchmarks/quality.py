"""Time to quality: `python -m benchmarks.quality` trains each contender for the same time on the same text.

The training command with AdamW set by hand is compared with the Trainer of Hugging Face transformers and the same
model (LlamaForCausalLM): once with the Trainer's default settings, once with textmill's batch size, learning rate and schedule.
All read the same windows, are validated on the same windows and take as many steps as fit into the time, so that every schedule
reaches its end. They take turns of a few seconds, one running and the others stopped, so that a slow machine slows all of them.
Only the time that a contender runs counts.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.data import prepare_corpus
from benchmarks.measure import CORES, RESULTS, Figure, keep, logged, table
from llm_core.config import ShardConfig, TokenizerConfig, TrainConfig
from llm_core.dataset import load_manifest

SHAPE: dict[str, Any] = {"hidden_size": 192, "num_layers": 4, "num_heads": 6}
RECIPE: dict[str, Any] = {"batch_size": 4, "learning_rate": 1.5e-3}
VOCABULARY, LENGTH = 4096, 256
EVALUATIONS, EVAL_TOKENS = 12, 1 << 15
TRIAL_STEPS, TRIAL_EVAL_TOKENS = 60, 1 << 12
TURN, TRIAL_TURN = 20.0, 3.0  # seconds
SAFETY = 0.97  # share of the time to plan for; the rest is a reserve for a slow machine

TEXTMILL, DEFAULTS, TUNED = "textmill", "transformers Trainer, its settings", "transformers Trainer, textmill's settings"
CONTENDERS = [TEXTMILL, DEFAULTS, TUNED]

# (seconds, bits per byte of the held-out text) of each validation.
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Pace:
    """Seconds of a step and of a validation."""

    step: float
    validation: float

    def steps(self, seconds: float) -> int:
        """The number of steps that fit, a multiple of the number of validations."""
        each = (SAFETY * seconds / EVALUATIONS - self.validation) / self.step
        return EVALUATIONS * max(1, math.floor(each))


@dataclass(frozen=True)
class Progress:
    """The end of each step and each validation, in seconds of the clock or, after `at_work`, of the contender's own time."""

    ends: list[float]
    curve: Curve

    def at_work(self, turns: Sequence[tuple[float, float]]) -> "Progress":
        """Counts only the time within the turns, from the start of the first step."""

        def own(moment: float) -> float:
            return sum(max(0.0, min(moment, end) - start) for start, end in turns)

        ends = [own(moment) for moment in self.ends]
        began = ends[0] - (ends[-1] - ends[0]) / max(1, len(ends) - 1)
        return Progress([end - began for end in ends], [(own(moment) - began, value) for moment, value in self.curve])


def train_textmill(data_dir: Path, run_dir: Path, steps: int, interval: int, eval_tokens: int) -> Progress:
    """Runs the training command."""
    options = SHAPE | RECIPE | {"max_steps": steps, "eval_interval": interval, "eval_tokens": eval_tokens, "save_interval": 0}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "llm_core.train", f"--data_dir={data_dir}", f"--save_dir={run_dir}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    records = logged(run_dir)
    curve = [(record["time"], record["val_bits_per_byte"]) for record in records["eval"]]
    return Progress([record["time"] for record in records["train"]], curve)


def train_transformers(data_dir: Path, tuned: bool, steps: int, interval: int, eval_tokens: int) -> Progress:
    """Runs the Trainer in this process."""
    import numpy as np
    import torch
    from torch import Tensor, nn
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from llm_core.config import ModelConfig
    from llm_core.distributed.ranks import Ranks
    from llm_core.evaluation.held_out import evaluate
    from llm_core.huggingface.llama import llama_config
    from llm_core.training.run_data import TrainingData

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    manifest = load_manifest(data_dir)
    ours = TrainConfig(**SHAPE, **RECIPE, max_steps=steps, eval_tokens=eval_tokens).resolved(manifest.max_length, manifest.stride)
    data = TrainingData.open(data_dir, manifest, ours, None)
    model = LlamaForCausalLM(
        LlamaConfig(**llama_config(ModelConfig.of(ours, manifest.tokenizer.vocab_size), data.tokenizer.eot_id))
    )

    class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(data.train)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            inputs = data.train.batch(np.array([index]))[0][0]
            return {"input_ids": inputs, "labels": inputs}  # the model shifts the labels itself

    class PerToken(nn.Module):
        """The peer's model with the interface that `evaluate` expects."""

        def forward(self, inputs: Tensor, targets: Tensor, per_token: bool) -> Tensor:
            logits = model(inputs).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    ends: list[float] = []
    curve: Curve = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            ends.append(time.time())
            if state.global_step % interval == 0 or state.global_step == steps:
                model.eval()
                held_out = evaluate(
                    PerToken(),  # type: ignore[arg-type]
                    data.val,
                    data.token_bytes,
                    batch_size=8,
                    ranks=Ranks.alone("cpu", CORES),
                )
                model.train()
                curve.append((time.time(), held_out.bits_per_byte))

    settings: dict[str, Any] = {}
    if tuned:
        settings = {
            "per_device_train_batch_size": ours.batch_size,
            "learning_rate": ours.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": ours.min_lr},
            "warmup_steps": ours.warmup_steps,
            "weight_decay": ours.weight_decay,
            "adam_beta2": ours.beta2,
        }
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=steps, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **settings
        )
        Trainer(model, arguments, train_dataset=Examples(), callbacks=[Watch()]).train()
    return Progress(ends, curve)


def contend(contender: str, out: Path, steps: int, interval: int, eval_tokens: int) -> None:
    """The process of a contender: trains on the data beside `out` and writes its progress to `out`."""
    data_dir = out.parent / "data"
    if contender == TEXTMILL:
        progress = train_textmill(data_dir, out.with_suffix(""), steps, interval, eval_tokens)
    else:
        progress = train_transformers(data_dir, contender == TUNED, steps, interval, eval_tokens)
    out.write_text(json.dumps([progress.ends, progress.curve]))


def contest(
    folder: Path, stage: str, steps: Mapping[str, int], evaluations: int, eval_tokens: int, turn: float
) -> dict[str, Progress]:
    """Lets every contender take its steps, `turn` seconds at a time."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    turns: dict[str, list[tuple[float, float]]] = {contender: [] for contender in steps}
    for number, (contender, count) in enumerate(steps.items()):
        options = {"contend": contender, "out": folder / f"{stage}{number}.json", "steps": count}
        options |= {"interval": count // evaluations, "eval_tokens": eval_tokens}
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
        if better <= bits_per_byte:
            return after if worse <= better else before + (after - before) * max(0.0, worse - bits_per_byte) / (worse - better)
    return math.inf


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Bits per byte over minutes of training."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for (name, curve), color in zip(curves.items(), ("#4c72b0", "#8c8c8c", "#dd8452"), strict=False):
        axes.plot([at / 60 for at, _ in curve], [value for _, value in curve], color=color, marker="o", markersize=3,
                  label=f"{name}: {curve[-1][1]:.3f}")  # fmt: skip
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("bits per byte of held-out text")
    axes.set_ylim(bottom=0.95 * min(value for curve in curves.values() for _, value in curve))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    picture.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description="Quality reached in the same training time."
    )
    parser.add_argument("--minutes", type=float, default=10, help="training time of each contender")
    parser.add_argument("--corpus", type=Path, help="folder of .py, .txt, .md and .rst files; default: the Python installation")
    parser.add_argument("--megabytes", type=float, default=60, help="size of the text to use")
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    for name, kind in {"out": Path, "steps": int, "interval": int, "eval_tokens": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, options.out, options.steps, options.interval, options.eval_tokens)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, shards = TokenizerConfig(vocab_size=VOCABULARY), ShardConfig(max_length=LENGTH)
        manifest = load_manifest(prepare_corpus(options.corpus, options.megabytes, folder, tokenizer, shards))
        print(f"{manifest.splits['train'].tokens:,} training tokens", flush=True)
        trials = contest(folder, "trial", dict.fromkeys(CONTENDERS, TRIAL_STEPS), 1, TRIAL_EVAL_TOKENS, TRIAL_TURN)
        steps = {contender: pace_of(trial).steps(60 * options.minutes) for contender, trial in trials.items()}
        results = contest(folder, "run", steps, EVALUATIONS, EVAL_TOKENS, TURN)
    curves = {contender: progress.curve for contender, progress in results.items()}
    rows = []
    for contender, curve in curves.items():
        final = curve[-1][1]
        reached = seconds_to(curves[TEXTMILL], final)
        if contender == TEXTMILL:
            share = ""
        else:
            share = f"{reached:.0f} s, {reached / curve[-1][0]:.0%} of its time" if math.isfinite(reached) else "not in this time"
        rows.append((contender, f"{steps[contender]:,}", f"{curve[-1][0]:.0f}", f"{final:.4f}", share))
    print("\n" + table(["", "steps", "seconds", "bits per byte", "textmill is there after"], rows))
    draw(curves, RESULTS / "quality.png")
    figures = [Figure(contender, "bits per byte", [value for _, value in curve]) for contender, curve in curves.items()]
    for figure, curve in zip(figures, curves.values(), strict=True):
        path = keep("quality", [figure], steps=steps[figure.name], seconds=[round(at, 1) for at, _ in curve])
    print(f"\nappended to {path}, drawn in {RESULTS / 'quality.png'}")


if __name__ == "__main__":
    main()
