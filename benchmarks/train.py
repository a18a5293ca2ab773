"""The training step compared with its peers: `python -m benchmarks.train` prints a table for each shape and draws a chart.

textmill, LlamaForCausalLM of Hugging Face transformers and, if installed, litgpt: the same shape, random tokens, full optimizer
steps (zero gradients, forward, backward, clip, fused AdamW) in fp32 on a CPU. Each contender runs in its own process, so that its
memory can be measured, and they step in turns: first the eager ones, then the compiled ones.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import CORES, RESULTS, Figure, keep, peak_memory, ratios, table
from llm_core.config import ModelConfig, TrainConfig
from llm_core.huggingface.llama import llama_config
from llm_core.model.transformer import Transformer
from llm_core.system import keep_freed_memory
from llm_core.training.optim import build_optimizers
from llm_core.training.performance import measure_peak_flops

# A model, and a function of (model, inputs, targets) that computes the loss.
Peer = tuple[Any, Callable[[Any, Any, Any], Any]]

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """A model and its batch; batch in windows, length in tokens."""

    options: dict[str, Any]
    length: int
    batch: int


SHAPES = {
    "tiny": Shape({"model": "tiny"}, 512, 8),
    "small": Shape({"model": "small"}, 1024, 2),
    "grouped": Shape({"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2}, 1024, 2),
}
PROJECTS = ["textmill", "transformers", *(["litgpt"] if find_spec("litgpt") else [])]
COMPILED = ", compiled"
CONTENDERS = [project + kind for kind in ("", COMPILED) for project in PROJECTS]


def step_of(contender: str, shape: Shape) -> tuple[Callable[[], None], int]:
    """A function that takes one optimizer step, and the FLOPs of the step."""
    torch.set_num_threads(CORES)
    torch.set_flush_denormal(True)
    if contender.startswith("textmill"):
        keep_freed_memory()  # as the trainer does
    torch.manual_seed(0)
    train_config = TrainConfig(**shape.options).resolved(shape.length, 0)
    config = ModelConfig.of(train_config, VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (shape.batch, shape.length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    ours = Transformer(config)
    flops = ours.flops_per_token() * targets.numel()
    if contender.startswith("textmill"):
        ours.init_weights(0)
        (optimizer,) = build_optimizers(ours, train_config)
        if contender.endswith(COMPILED):
            torch.use_deterministic_algorithms(True)  # as the trainer does
            for block in ours.blocks:
                block.compile()
        parameters = list(ours.parameters())

        def loss() -> torch.Tensor:
            nll: torch.Tensor = ours(inputs, targets)
            return nll / targets.numel()

    else:
        theirs, loss_of = _transformers(config) if contender.startswith("transformers") else _litgpt(config)
        parameters = list(theirs.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)
        model = torch.compile(theirs) if contender.endswith(COMPILED) else theirs

        def loss() -> torch.Tensor:
            return loss_of(model, inputs, targets)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return step, flops


def _transformers(config: ModelConfig) -> Peer:
    from transformers import LlamaConfig, LlamaForCausalLM

    def loss(model: Any, inputs: Any, targets: Any) -> Any:
        return model(inputs, labels=inputs).loss  # the model shifts the labels itself

    return LlamaForCausalLM(LlamaConfig(**llama_config(config, 0))), loss


def _litgpt(config: ModelConfig) -> Peer:
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    shape = Config(
        block_size=config.max_length,
        padded_vocab_size=config.padded_vocab_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_embd=config.hidden_size,
        n_query_groups=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    return GPT(shape), lambda model, inputs, targets: chunked_cross_entropy(model(inputs), targets)


def contend(contender: str, shape: Shape) -> None:
    """The process of a contender: one step for each line on stdin, between two large matrix products."""
    step, flops = step_of(contender, shape)
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        before = measure_peak_flops(torch.device("cpu"), torch.float32, 0.1)
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        # On a shared machine, the better of the two is the peak of this moment.
        peak = max(before, measure_peak_flops(torch.device("cpu"), torch.float32, 0.1))
        print(json.dumps({"seconds": seconds, "memory": peak_memory() / 1e9, "share": flops / seconds / peak}), flush=True)


def compare(name: str, shape: Shape, contenders: list[str], rounds: int) -> list[Figure]:
    """Figures of one shape: tokens per second, share of the peak (a matrix product), and peak memory of each contender."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    running: dict[str, subprocess.Popen[str]] = {}
    for contender in contenders:
        command = [sys.executable, "-m", "benchmarks.train", "--contend", contender, "--shapes", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        running[contender] = process
        _line(process)
    results: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, process in running.items():
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            results[contender].append(json.loads(_line(process)))
        print(".", end="", flush=True)
    print()
    for process in running.values():
        process.communicate()
    tokens = shape.batch * shape.length
    figures = []
    for contender, measured in results.items():
        label = f"{name}, {contender}"
        figures.append(Figure(label, "tokens/s", [tokens / one["seconds"] for one in measured]))
        figures.append(Figure(label, "share of peak", [one["share"] for one in measured]))
        figures.append(Figure(label, "GB", [measured[-1]["memory"]]))
    return figures


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"contender failed: {process.args!r}")
    return line


def draw(figures: list[Figure], path: Path) -> None:
    """Draws tokens per second of each contender, one panel per shape; the thin line spans the rounds."""
    from matplotlib.figure import Figure as Picture

    speeds = [figure for figure in figures if figure.unit == "tokens/s"]
    shapes = list(dict.fromkeys(figure.name.split(", ")[0] for figure in speeds))
    picture = Picture(figsize=(4 * len(shapes), 0.8 + 0.35 * len(speeds) / len(shapes)), layout="constrained")
    for axes, shape in zip(picture.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        shown = [figure for figure in speeds if figure.name.startswith(f"{shape}, ")][::-1]
        names = [figure.name.removeprefix(f"{shape}, ") for figure in shown]
        medians = [figure.median for figure in shown]
        spans = [
            [figure.median - min(figure.values) for figure in shown],
            [max(figure.values) - figure.median for figure in shown],
        ]
        colors = ["#4c72b0" if name.startswith("textmill") else "#8c8c8c" for name in names]
        bars = axes.barh(names, medians, xerr=spans, color=colors, error_kw={"linewidth": 0.8})
        axes.bar_label(bars, fmt="{:,.0f}", label_type="center", color="white")
        axes.set_title(f"{shape}: tokens per second", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="The training step compared with its peers.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--eager", action="store_true", help="skip the compiled contenders")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, SHAPES[options.shapes[0]])
        return
    all_figures: list[Figure] = []
    for name in options.shapes:
        rows = []
        for kind in ("",) if options.eager else ("", COMPILED):
            figures = compare(name, SHAPES[name], [project + kind for project in PROJECTS], options.rounds)
            all_figures += figures
            peer = next(figure for figure in figures if figure.name == f"{name}, transformers{kind}")
            for speed, share, memory in (figures[start : start + 3] for start in range(0, len(figures), 3)):
                ratio = ratios(speed, peer)
                shown = f"{share.median:.0%} ({min(share.values):.0%} to {max(share.values):.0%})"
                rows.append((speed.name.removeprefix(f"{name}, "), speed, ratio, shown, f"{memory.median:.2f}"))
            path = keep("train", figures)
        print(table([name, "tokens/s", "transformers is 1", "of peak", "GB"], rows) + "\n", flush=True)
    if options.eager or options.shapes != list(SHAPES):
        print(f"appended to {path}; a chart is drawn only for a complete run")
        return
    draw(all_figures, RESULTS / "train.png")
    print(f"appended to {path}, drawn in {RESULTS / 'train.png'}")


if __name__ == "__main__":
    main()
