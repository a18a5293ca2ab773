"""What the machine computes with, found without PyTorch."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_core.config import TrainConfig
from llm_core.system import Gpu, cpu_has_bf16, cpu_name, gpu, hardware, has_fast_bf16


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for function in (gpu, cpu_name, cpu_has_bf16):
        function.cache_clear()
    yield
    for function in (gpu, cpu_name, cpu_has_bf16):
        function.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, flags: str, accelerator: Gpu | None = None, limit: str | None = None) -> None:
    """A machine with such a CPU and GPU. limit: of oneDNN."""
    cpu_has_bf16.cache_clear()
    monkeypatch.setattr(hardware, "_cpuinfo", lambda: ["model name\t: A CPU", f"flags\t\t: fpu {flags}"])
    monkeypatch.setattr(hardware, "gpu", lambda: accelerator)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)


def test_precision_auto_follows_from_the_device_and_is_part_of_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(**options: object) -> TrainConfig:
        return TrainConfig(**options).resolved(64, 0)  # type: ignore[arg-type]

    for flags in ("avx2", "avx512f avx512_vnni"):
        pretend(monkeypatch, flags)
        assert resolved().identity()["precision"] == "auto", "fp32, with the id that it always had"
    for flags in ("avx512f avx512_bf16", "amx_bf16 amx_tile"):
        pretend(monkeypatch, flags)
        assert resolved().identity()["precision"] == "bf16"
    assert resolved(precision="fp32").precision == "fp32"
    assert resolved(mixed_precision=True).identity()["precision"] == "auto", "decided by the device that trains, as before"


def test_a_limit_of_onednn_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in (("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("DEFAULT", True)):
        pretend(monkeypatch, "avx512_bf16", limit=limit)
        assert has_fast_bf16("cpu") == expected, limit


def test_a_gpu_decides_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx512_bf16", Gpu("Turing", 7.5))
    assert [has_fast_bf16(device) for device in ("auto", "cuda", "cpu")] == [False, False, True]
    pretend(monkeypatch, "avx2", Gpu("Hopper", 9.0))
    assert [has_fast_bf16(device) for device in ("auto", "cuda", "cpu")] == [True, True, False]
    pretend(monkeypatch, "avx512_bf16")
    assert not has_fast_bf16("cuda"), "there is none"


def test_several_gpus_are_as_capable_as_the_least_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 141 GB, 9.0'\necho 'NVIDIA T4, 7.5'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "_pytorch_has_cuda", lambda: True)
    assert gpu() == Gpu("NVIDIA H200, 141 GB", 7.5)

    for hidden in ("", "-1"):
        gpu.cache_clear()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu() is None
    gpu.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(hardware, "_pytorch_has_cuda", lambda: False)
    assert gpu() is None, "the CPU build of PyTorch cannot use it"


def test_a_broken_driver_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver.'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(hardware, "_pytorch_has_cuda", lambda: True)
    assert gpu() is None
