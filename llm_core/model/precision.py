"""The dtype of matrix products."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from llm_core.config import TrainConfig
from llm_core.system import cpu_has_bf16

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The `precision` of a resolved configuration.

    There auto means fp32, or with `mixed_precision` the device's fastest safe dtype.

    A CPU without bf16 instructions emulates bf16 and fp16 20 to 50 times slower than fp32: there mixed precision stays fp32, and
    requesting either of them warns.
    """
    if config.precision != "auto":
        if device.type == "cpu" and config.precision != "fp32" and not cpu_has_bf16():
            warnings.warn(f"--precision {config.precision} is emulated on this CPU and far slower than fp32", stacklevel=2)
        return config.precision
    if not config.mixed_precision:
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def evaluation_precision(trained: Precision, device: torch.device) -> Precision:
    """The precision that a model was trained in; fp32 where the device would emulate it."""
    if device.type == "cuda":
        return trained if trained != "bf16" or torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if trained == "bf16" and cpu_has_bf16() else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in `precision` and numerically sensitive operations in fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])
