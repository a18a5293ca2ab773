"""The training step beside its peer: `python -m benchmarks.train` prints a table for each shape.

textmill against LlamaForCausalLM of Hugging Face transformers: the same shape, random tokens, full optimizer steps (zero
gradients, forward, backward, clip, fused AdamW) in fp32 on a CPU. Each contender is a process of its own, so that its memory
can be told, and they take their steps in turns.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import CORES, Figure, keep, peak_memory, table

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
CONTENDERS = ["textmill", "transformers", "textmill, compiled", "transformers, compiled"]


def step_of(contender: str, shape: Shape) -> tuple[Callable[[], None], int]:
    """A function that does one optimizer step, and the FLOPs of it."""
    import torch

    from llm_core.config import ModelConfig, TrainConfig
    from llm_core.export import llama_config
    from llm_core.model import Transformer
    from llm_core.optimizer import build_optimizers

    torch.set_num_threads(CORES)
    torch.set_flush_denormal(True)
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
        if contender.endswith("compiled"):
            torch.use_deterministic_algorithms(True)  # as the trainer does
            for block in ours.blocks:
                block.compile()
        parameters = list(ours.parameters())

        def loss() -> torch.Tensor:
            nll: torch.Tensor = ours(inputs, targets)
            return nll / targets.numel()

    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        theirs = LlamaForCausalLM(LlamaConfig(**llama_config(config, 0)))
        parameters = list(theirs.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)
        model = torch.compile(theirs) if contender.endswith("compiled") else theirs

        def loss() -> torch.Tensor:
            found: torch.Tensor = model(inputs, labels=inputs).loss  # it shifts the labels itself
            return found

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    return step, flops


def contend(contender: str, shape: Shape) -> None:
    """The process of a contender: one step for each line it is given."""
    import torch

    from llm_core.throughput import measure_peak_flops

    step, flops = step_of(contender, shape)
    for _ in range(2):
        step()
    print(json.dumps({"flops": flops}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        peak = measure_peak_flops(torch.device("cpu"), torch.float32, 0.1)
        print(json.dumps({"seconds": seconds, "memory": peak_memory() / 1e9, "peak": peak}), flush=True)


def compare(name: str, shape: Shape, contenders: list[str], rounds: int) -> list[Figure]:
    """Figures of one shape: tokens per second, share of the peak of a matrix product, and peak memory of each contender."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    running: dict[str, subprocess.Popen[str]] = {}
    flops = 0
    for contender in contenders:
        command = [sys.executable, "-m", "benchmarks.train", "--contend", contender, "--shapes", name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        running[contender] = process
        flops = _answer(process)["flops"]
    found: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, process in running.items():
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            found[contender].append(_answer(process))
        print(".", end="", flush=True)
    print()
    for process in running.values():
        process.communicate()
    tokens = shape.batch * shape.length
    # One peak for all: the best that any of them saw, a matrix product being disturbed like everything else.
    peak = max(one["peak"] for measured in found.values() for one in measured)
    figures = []
    for contender, measured in found.items():
        label = f"{name}, {contender}"
        figures.append(Figure(label, "tokens/s", [tokens / one["seconds"] for one in measured]))
        figures.append(Figure(label, "share of peak", [flops / one["seconds"] / peak for one in measured]))
        figures.append(Figure(label, "GB", [measured[-1]["memory"]]))
    return figures


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended: {process.args}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description="The training step beside its peer.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--eager", action="store_true", help="leave the compiled contenders out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contend", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend, SHAPES[options.shapes[0]])
        return
    for name in options.shapes:
        contenders = [contender for contender in CONTENDERS if not (options.eager and contender.endswith("compiled"))]
        figures = compare(name, SHAPES[name], contenders, options.rounds)
        by_contender = [figures[start : start + 3] for start in range(0, len(figures), 3)]
        rows = []
        for speed, share, memory in by_contender:
            peer = next(f for f in figures if f.name == speed.name.replace("textmill", "transformers"))
            rows.append((speed.name, speed, f"{speed.median / peer.median:.2f}x", f"{share.median:.0%}", f"{memory.median:.2f}"))
        print(table([name, "tokens/s", "transformers is 1", "of peak", "GB"], rows) + "\n")
        path = keep("train", figures)
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
