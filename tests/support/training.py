"""Helpers of the training tests: a trainer in this process, and the tool in its own processes."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_core.checkpoint import starting_parent
from llm_core.checkpoint.state import load_checkpoint
from llm_core.config import TrainConfig
from llm_core.dataset import load_manifest
from llm_core.distributed.launch import StopRequest
from llm_core.distributed.ranks import Ranks
from llm_core.training import read_metrics
from llm_core.training.run_data import TrainingData
from llm_core.training.trainer import Trainer
from tests.support.forkserver import run_in_child

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "batch_size": 8,
    "max_steps": 10,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "eval_interval": 0,
    "eval_tokens": 512,
    "save_interval": 0,
}


def make_trainer(data_dir: Path, **options: Any) -> Trainer:
    """A trainer of a small model, on one thread."""
    manifest = load_manifest(data_dir)
    assert manifest.max_length is not None and manifest.stride is not None
    config = TrainConfig(**(SMALL | options)).resolved(manifest.max_length, manifest.stride)
    torch.set_num_threads(1)
    parent = starting_parent(config.init_from, resumed_from=None)
    return Trainer(config, TrainingData.open(data_dir, manifest, config, parent), Ranks.alone("cpu", 1), StopRequest())


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def flags(options: Mapping[str, Any]) -> list[str]:
    arguments = []
    for name, value in options.items():
        if value is None:
            continue
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return arguments


def train_arguments(data_dir: Path, save_dir: Path, **options: Any) -> list[str]:
    """The arguments of python or torchrun that train a small model, on one thread per process."""
    folders = ["--data_dir", str(data_dir), "--save_dir", str(save_dir)]
    return ["-m", "llm_core.train", *folders, *flags(SMALL | {"threads_per_process": 1, "device": "cpu"} | options)]


def run_train(
    data_dir: Path, save_dir: Path, ranks: int = 0, arguments: Sequence[str] = (), check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs the training tool on one thread per process, under torchrun if `ranks` is given."""
    module = [*train_arguments(data_dir, save_dir, **options), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if ranks:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *module]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    else:
        done = run_in_child(module[2:], environment)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of the training steps, without times and rates."""
    timed = {"time", "tokens_per_second", "mfu"}
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def assert_same_state(one: Path, other: Path, **tolerance: float) -> None:
    """Compares weights and optimizer state of two checkpoints, bit for bit unless a tolerance is given."""
    first, second = load_checkpoint(one), load_checkpoint(other)
    for name, weight in first["model"].items():
        torch.testing.assert_close(weight, second["model"][name], **(tolerance or {"rtol": 0, "atol": 0}))
    for saved, other_saved in zip(first["optimizers"], second["optimizers"], strict=True):
        for number, entry in saved["state"].items():
            for name, value in entry.items():
                torch.testing.assert_close(value, other_saved["state"][number][name], **(tolerance or {"rtol": 0, "atol": 0}))
