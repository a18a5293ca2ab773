"""--explain and --profile: estimates agree with the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_core.config import TrainConfig
from llm_core.training.cost import estimate_memory
from tests.support.training import run_train

_MEASURE = """
import sys, torch
from llm_core.config import ModelConfig, TrainConfig
from llm_core.model.transformer import Transformer
from llm_core.training.optim import build_optimizers
from llm_core.system import keep_freed_memory
keep_freed_memory()  # as the trainer does
config = TrainConfig.model_validate_json(sys.argv[1])
def kilobytes(name):  # getrusage would report the peak of the parent process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = kilobytes("VmRSS")
model = Transformer(ModelConfig.of(config, int(sys.argv[2]))).train()
model.init_weights(0)
optimizers = build_optimizers(model, config)
tokens = torch.zeros(config.batch_size, config.max_length, dtype=torch.long)
for _ in range(2):
    for optimizer in optimizers: optimizer.zero_grad()
    model(tokens, tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    for optimizer in optimizers: optimizer.step()
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "vocab_size"),
    [
        ({"hidden_size": 256, "num_layers": 8, "num_heads": 8, "batch_size": 8, "max_length": 512}, 2000),
        ({"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "batch_size": 2, "max_length": 512}, 8000),
        ({"hidden_size": 768, "num_layers": 4, "num_heads": 12, "batch_size": 1, "max_length": 256, "optimizer": "muon"}, 4000),
    ],
)
def test_the_memory_estimate_is_close_to_the_measured_peak(options: dict[str, object], vocab_size: int) -> None:
    config = TrainConfig(**options).resolved(512, 0)  # type: ignore[arg-type]
    command = [sys.executable, "-c", _MEASURE, config.model_dump_json(), str(vocab_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    estimate = estimate_memory(config, vocab_size, config.batch_size, "fp32").total
    assert estimate == pytest.approx(int(done.stdout), rel=0.3)


def test_gradient_checkpointing_and_smaller_micro_batches_need_less() -> None:
    def activations(micro_batch_size: int, **options: object) -> int:
        config = TrainConfig(hidden_size=64, num_layers=6, num_heads=4, max_length=128, **options).resolved(128, 0)  # type: ignore[arg-type]
        return estimate_memory(config, 300, micro_batch_size, "fp32").activations

    assert activations(4) == pytest.approx(2 * activations(2), rel=0.05)
    assert activations(4, gradient_checkpointing=True) < activations(4) / 3


def test_explain_prints_the_run_and_trains_nothing(data_dir: Path, tmp_path: Path) -> None:
    explained = run_train(data_dir, tmp_path / "run", explain=True)
    assert not (tmp_path / "run").exists()
    trained = run_train(data_dir, tmp_path / "run", max_steps=1)
    parameters = next(line.split()[-1] for line in explained.stdout.splitlines() if line.startswith("parameters"))
    assert f"{parameters} parameters" in trained.stderr
    for name in ("FLOPs per token", "memory per rank", "training tokens", "epochs", "expected time"):
        assert name in explained.stdout
    assert f"{10 * 8 * 64:,} in 10 steps of 512" in explained.stdout
    size, unit = next(line.split()[2:4] for line in explained.stdout.splitlines() if line.startswith("each checkpoint"))
    written = (tmp_path / "run/checkpoint_step_1.pt").stat().st_size
    assert float(size) * {"kB": 1e3, "MB": 1e6}[unit.strip(";")] == pytest.approx(written, rel=0.1)


def test_profile_writes_a_trace_of_the_requested_steps(data_dir: Path, tmp_path: Path) -> None:
    done = run_train(data_dir, tmp_path, profile="1:3", max_steps=5)
    assert f"trace of steps 1:3 in {tmp_path / 'trace_rank0.json'}" in done.stderr
    assert "warmup" not in done.stderr, "the user cannot act on the profiler's warning"
    trace = (tmp_path / "trace_rank0.json").read_text()
    assert "aten::mm" in trace
    assert trace.count("Optimizer.step#AdamW.step") >= 2
