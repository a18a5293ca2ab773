"""Tests that need a GPU: `pytest -m gpu` runs them alone."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_core.checkpoint.state import load_model
from llm_core.model.attention import Backend, DocumentMask, causal_attention, choose_backend
from llm_core.model.generation import generate
from llm_core.model.loss import nll_sum
from llm_core.training.performance import measure_peak_flops
from tests.support.training import assert_same_state, run_train, train_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
flash = pytest.mark.skipif(find_spec("flash_attn") is None, reason="the package flash-attn is not installed")

GPU: dict[str, Any] = {"device": "cuda", "hidden_size": 128, "max_steps": 6}


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in train_lines(run_dir)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("attention", ["sdpa", "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"document_masking": True}, {"gradient_checkpointing": True}, {"optimizer": "muon"}, {"compile_model": True}]
)
def test_a_gpu_trains_like_a_cpu(precision: str, attention: str, options: dict[str, Any], data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path / "gpu", **(GPU | options | {"precision": precision, "attention": attention}))
    run_train(data_dir, tmp_path / "cpu", **(GPU | options | {"device": "cpu", "compile_model": False}))
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}])
def test_rule_17_a_run_on_a_gpu_resumes(options: dict[str, Any], data_dir: Path, tmp_path: Path) -> None:
    saving = GPU | options | {"save_interval": 3, "keep_checkpoints": 5}
    run_train(data_dir, tmp_path / "whole", **saving)
    run_train(data_dir, tmp_path / "other", checkpoint=tmp_path / "whole/checkpoint_step_3.pt", **saving)
    assert_same_state(tmp_path / "whole/checkpoint_step_6.pt", tmp_path / "other/checkpoint_step_6.pt", rtol=1e-2, atol=1e-3)


@two_gpus
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_gpus_train_like_one_over_nccl(sharding: str, precision: str, data_dir: Path, tmp_path: Path) -> None:
    options = GPU | {"micro_batch_size": 2, "precision": precision}
    run_train(data_dir, tmp_path / "one", **options)
    run_train(data_dir, tmp_path / "two", ranks=2, sharding=sharding, **options)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3 if precision == "fp32" else 2e-2)


def attention_inputs(dtype: torch.dtype, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 32, generator=generator) for heads in (8, kv_heads, kv_heads))
    inputs = torch.randint(0, 9, (2, 64), generator=generator)  # 0 is the end of text
    return *(x.to("cuda", dtype).requires_grad_() for x in (q, k, v)), inputs.cuda()


def documents_of(inputs: torch.Tensor, backend: Backend, masked: bool) -> DocumentMask | None:
    return DocumentMask.from_inputs(inputs, 0, backend) if masked else None


@flash
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_flash_attention_equals_pytorchs_attention(kv_heads: int, masked: bool) -> None:
    q, k, v, inputs = attention_inputs(torch.bfloat16, kv_heads)
    results = []
    backends: list[Backend] = ["flash", "sdpa"]
    for backend in backends:
        out = causal_attention(q, k, v, backend, documents_of(inputs, backend, masked))
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_heads_on_a_gpu_equal_a_cpu_without_the_kernel_that_materializes_all_scores(
    dtype: torch.dtype, masked: bool
) -> None:
    q, k, v, inputs = attention_inputs(dtype, 2)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        on_gpu = causal_attention(q, k, v, "sdpa", documents_of(inputs, "sdpa", masked))
    q, k, v = (x.float().cpu() for x in (q, k, v))
    on_cpu = causal_attention(q, k, v, "sdpa", documents_of(inputs.cpu(), "sdpa", masked))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(on_gpu.float().cpu(), on_cpu, rtol=tolerance, atol=tolerance)


@flash
def test_auto_chooses_flash_where_it_runs() -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("flash-attn needs compute capability 8.0")
    assert choose_backend("auto", device, torch.bfloat16, 64) == "flash"
    assert choose_backend("auto", device, torch.float32, 64) == "sdpa"


def test_the_loss_of_many_equal_tokens_does_not_overflow_in_fp16() -> None:
    hidden = torch.randn(1 << 16, 64, device="cuda", requires_grad=True)
    weight = torch.randn(512, 64, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.float16):
        nll_sum(hidden, weight, torch.zeros(1 << 16, dtype=torch.long, device="cuda")).backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_generation_on_a_gpu_is_reproducible(data_dir: Path, tmp_path: Path) -> None:
    run_train(data_dir, tmp_path, **GPU)
    model, _ = load_model(tmp_path / "checkpoint_step_6.pt")
    samples = [list(generate(model.cuda(), [1, 2, 3], 16, temperature=0.8, top_k=20, seed=1)) for _ in range(2)]
    assert samples[0] == samples[1]


def test_rule_25_the_peak_of_a_gpu_is_measured() -> None:
    assert measure_peak_flops(torch.device("cuda", 0), torch.bfloat16) > 1e12
