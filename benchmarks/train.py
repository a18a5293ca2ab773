"""The training step beside its peers: `python -m benchmarks.train` prints a table for each shape and draws a picture.

textmill against LlamaForCausalLM of Hugging Face transformers, and litgpt where it is installed: the same shape, random tokens,
full optimizer steps (zero gradients, forward, backward, clip, fused AdamW) in fp32 on a CPU. Each contender is a process of its
own, so that its memory can be told, and they take their steps in turns: first those that run eagerly, then the compiled ones.
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
from llm_core.export import llama_config
from llm_core.model import Transformer
from llm_core.optimizer import build_optimizers
from llm_core.processes import keep_freed_memory
from llm_core.throughput import measure_peak_flops

Peer = tuple[Any, Callable[[Any, Any, Any], Any]]
"""A model, and the loss of (model, inputs, targets)."""

VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """What is trained; batch in windows, length in tokens."""

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
    """A function that does one optimizer step, and the FLOPs of it."""
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
        return model(inputs, labels=inputs).loss  # it shifts the labels itself

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
    """The process of a contender: one step for each line it is given, between two large matrix products."""
    step, flops = step_of(contender, shape)
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        before = measure_peak_flops(torch.device("cpu"), torch.float32, 0.1)
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        # A machine that others disturb is as fast as the better of the two, and no faster a minute later.
        peak = max(before, measure_peak_flops(torch.device("cpu"), torch.float32, 0.1))
        print(json.dumps({"seconds": seconds, "memory": peak_memory() / 1e9, "share": flops / seconds / peak}), flush=True)


def compare(name: str, shape: Shape, contenders: list[str], rounds: int) -> list[Figure]:
    """Figures of one shape: tokens per second, share of the speed of a matrix product, and peak memory of each contender."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    running: dict[str, subprocess.Popen[str]] = {}
    for contender in contenders:
        command = [sys.executable, "-m", "benchmarks.train", "--contend", contender, "--shapes", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        running[contender] = process
        _line(process)
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, process in running.items():
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            found[contender].append(json.loads(_line(process)))
        print(".", end="", flush=True)
    print()
    for process in running.values():
        process.communicate()
    tokens = shape.batch * shape.length
    figures = []
    for contender, measured in found.items():
        label = f"{name}, {contender}"
        figures.append(Figure(label, "tokens/s", [tokens / one["seconds"] for one in measured]))
        figures.append(Figure(label, "share of peak", [one["share"] for one in measured]))
        figures.append(Figure(label, "GB", [measured[-1]["memory"]]))
    return figures


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended: {process.args!r}")
    return line


def draw(figures: list[Figure], path: Path) -> None:
    """Tokens per second of each contender, a panel for each shape; the thin line spans the rounds."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="The training step beside its peers.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--eager", action="store_true", help="leave the compiled contenders out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, SHAPES[options.shapes[0]])
        return
    everything: list[Figure] = []
    for name in options.shapes:
        rows = []
        for kind in ("",) if options.eager else ("", COMPILED):
            figures = compare(name, SHAPES[name], [project + kind for project in PROJECTS], options.rounds)
            everything += figures
            peer = next(figure for figure in figures if figure.name == f"{name}, transformers{kind}")
            for speed, share, memory in (figures[start : start + 3] for start in range(0, len(figures), 3)):
                ratio = ratios(speed, peer)
                shown = f"{share.median:.0%} ({min(share.values):.0%} to {max(share.values):.0%})"
                rows.append((speed.name.removeprefix(f"{name}, "), speed, ratio, shown, f"{memory.median:.2f}"))
            path = keep("train", figures)
        print(table([name, "tokens/s", "transformers is 1", "of peak", "GB"], rows) + "\n", flush=True)
    if options.eager or options.shapes != list(SHAPES):
        print(f"kept in {path}; only a whole run is drawn")
        return
    draw(everything, RESULTS / "train.png")
    print(f"kept in {path}, drawn in {RESULTS / 'train.png'}")


if __name__ == "__main__":
    main()
