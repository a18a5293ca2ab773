"""What this machine computes with. Asked without PyTorch, which takes seconds to load."""

import importlib.util
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Values of oneDNN's ONEDNN_MAX_CPU_ISA that forbid its bf16 instructions.
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Gpu:
    """The CUDA devices of this machine."""

    name: str  # of the first
    capability: float  # CUDA compute capability, such as 8.0; the lowest, since a process may be shown any of them


@cache
def gpu() -> Gpu | None:
    """What nvidia-smi reports; None if there is no GPU, it is hidden, or the installed PyTorch cannot use it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1")
    if hidden or not _pytorch_has_cuda():
        return None
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines()]
        return Gpu(rows[0][0].strip(), min(float(capability) for _, capability in rows))
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None


@cache
def cpu_name() -> str:
    """The model of the CPU."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies in bf16 (AVX-512 BF16 or AMX) and oneDNN may use that."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if limit.upper() in _WITHOUT_BF16:
        return False
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def has_fast_bf16(device: str) -> bool:
    """Whether the device of a configuration, `auto`, `cpu` or `cuda`, has fast units for bf16."""
    accelerator = gpu() if device != "cpu" else None
    if accelerator is not None:
        return accelerator.capability >= 8.0
    return device != "cuda" and cpu_has_bf16()


def _pytorch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec is not None else None
    return any(list(Path(folder).glob("lib/*torch_cuda.*")) for folder in folders or [])


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
