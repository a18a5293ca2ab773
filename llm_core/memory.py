"""Refuses a run that no memory of this machine could hold, before the system kills what else runs on it."""

import os

import psutil
import torch

from llm_core.config import ModelConfig, TrainConfig
from llm_core.distributed import Ranks
from llm_core.errors import UserError


def require_memory(config: TrainConfig, model: ModelConfig, micro_batch_size: int, ranks: Ranks) -> None:
    """Compares what the ranks of this machine need at the very least with all the memory that it has.

    Counted are weights, gradients, the optimizer's state and one half-precision activation per token and block; `--explain`
    estimates the whole.

    Raises:
        UserError: it is more.
    """
    per_parameter = 4 + 4 + (8 if config.optimizer == "adamw" else 4)
    sharers = ranks.world_size if config.sharding == "fsdp" else 1
    tokens = micro_batch_size * model.max_length
    needed = per_parameter * model.num_parameters // sharers + 2 * tokens * model.hidden_size * model.num_layers
    if ranks.device.type == "cuda":
        present, where = torch.cuda.get_device_properties(ranks.device).total_memory, "the GPU has"
    else:
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        present, where = psutil.virtual_memory().total + psutil.swap_memory().total, "this machine has"
    if needed > present:
        raise UserError(
            f"--hidden_size {model.hidden_size} --num_layers {model.num_layers}: {model.num_parameters:,} parameters and a "
            f"micro-batch of {micro_batch_size:,} windows of {model.max_length:,} tokens need at least {needed / 1e9:,.1f} GB, "
            f"{where} {present / 1e9:,.1f} GB; choose a smaller model, --micro_batch_size or --max_length"
        )
