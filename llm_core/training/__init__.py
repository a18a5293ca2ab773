"""A training run: data mixture, trainer, loop, optimizers, metrics and cost estimate."""

from llm_core.training.run_log import Callback, MetricsLine, read_metrics

# Modules that need PyTorch are entered by name: cost, optim, performance, run, run_data.
__all__ = ["Callback", "MetricsLine", "cost", "optim", "performance", "read_metrics", "run", "run_data"]
