"""The learning rate of each step."""

import math

from llm_core.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of 0-based optimizer step `step`: a pure function, never stored state.

    Linear warm-up that starts above 0, then the schedule's decay, which reaches min_lr at the last step and stays there.
    """
    peak, lowest, warmup = config.learning_rate, config.min_lr, config.warmup_steps
    assert lowest is not None and warmup is not None, "learning_rate needs a resolved configuration"
    last, start = config.max_steps - 1, decay_start(config)
    if step >= last:
        return lowest
    if step < warmup:
        return peak * (step + 1) / warmup
    if step <= start:
        return peak
    progress = (step - start) / (last - start)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return lowest + (peak - lowest) * shape


def decay_start(config: TrainConfig) -> int:
    """The step from which on the learning rate falls; for wsd also the number of steps after which a checkpoint is kept."""
    assert config.warmup_steps is not None, "decay_start needs a resolved configuration"
    if config.lr_schedule != "wsd":
        return config.warmup_steps
    return max(config.warmup_steps, config.max_steps - 1 - round(config.decay_fraction * config.max_steps))
