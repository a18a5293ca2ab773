"""A training run: plan, data mixture, trainer, loop, optimizers, metrics and cost estimate."""

from llm_core.training.plan import Plan, find_plan, machine, request_id, resolve
from llm_core.training.run_log import Callback, MetricsLine, read_metrics

# Modules that need PyTorch are entered by name: cost, optim, performance, planner, run, run_data.
__all__ = [
    "Callback", "MetricsLine", "Plan", "cost", "find_plan", "machine", "optim", "performance", "planner", "read_metrics",
    "request_id", "resolve", "run", "run_data",
]  # fmt: skip
