"""What the defaults, which are for a GPU, cost on a CPU: said before a run begins, not hours later."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_core.config import ModelConfig
from llm_core.errors import UserError
from llm_core.system import gpu
from pipeline.assets.checkpoint import CheckpointConfig
from pipeline.assets.tokenized_shards import TokenizedShardsConfig
from pipeline.assets.trained_tokenizer import TrainedTokenizerConfig

CPU_CONFIG = "configs/cpu.yaml"

# Share of the peak that training reaches, and the hours from which a run is worth a warning.
_UTILIZATION, _HOURS = 0.5, 1.0


def warning_of_hours(configs: Mapping[str, Any]) -> str | None:
    """What to say before a training that takes hours on this machine's CPU; None for any other run.

    configs: the options of each step of the run.
    """
    if not {"checkpoint", "tokenized_shards", "trained_tokenizer"} <= configs.keys():
        return None  # no training, or one on prepared data, whose windows and vocabulary are not known here
    training = CheckpointConfig(**configs["checkpoint"])
    if training.train_minutes is not None or training.max_epochs is not None:
        return None
    if training.device == "cuda" or (training.device == "auto" and gpu() is not None):
        return None
    shards = TokenizedShardsConfig(**configs["tokenized_shards"])
    vocab_size = TrainedTokenizerConfig(**configs["trained_tokenizer"]).vocab_size
    try:
        config = training.resolved(shards.max_length, shards.stride)
    except UserError:  # reported by the check of the configuration
        return None
    model = ModelConfig.of(config, vocab_size)
    tokens = config.max_steps * config.batch_size * config.max_length
    hours = model.flops_per_token * tokens / (_peak_flops() * _UTILIZATION) / 3600
    if hours < _HOURS:
        return None
    return (
        f"a new training of {model.num_parameters / 1e6:,.0f} M parameters on {tokens / 1e6:,.0f} M tokens takes about "
        f"{hours:,.0f} hours on this CPU; -c {CPU_CONFIG} trains for ten minutes, and train_minutes in it for as long as you like"
    )


def _peak_flops(size: int = 1024, repetitions: int = 5) -> float:
    """FLOPs per second of the fastest of a few fp32 matrix products, on all cores, without PyTorch, which this process lacks."""
    matrix = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
