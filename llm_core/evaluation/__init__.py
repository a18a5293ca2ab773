"""How good a checkpoint is: held-out text, lm-eval tasks, and the files that keep the results."""

from llm_core.evaluation.results import (
    Evaluation,
    Sample,
    TaskResults,
    by_source,
    evaluation_path,
    metric,
    read_evaluation,
    read_results,
    read_task_results,
    task_figures,
    tasks_path,
)

# Modules that need PyTorch are entered by name: evaluator, held_out, tasks.
__all__ = [
    "Evaluation", "Sample", "TaskResults", "by_source", "evaluation_path", "evaluator", "held_out", "metric", "read_evaluation",
    "read_results", "read_task_results", "task_figures", "tasks", "tasks_path",
]  # fmt: skip
