"""How good a checkpoint is: held-out text, lm-eval tasks, and the files that keep the results."""

from llm_core.evaluation.comparison import MIN_DOCUMENTS, Difference, compare
from llm_core.evaluation.results import (
    Evaluation,
    Sample,
    TaskResults,
    by_source,
    check_tasks,
    evaluation_path,
    is_complete,
    metric,
    read_documents,
    read_evaluation,
    read_results,
    read_task_results,
    task_figures,
    tasks_path,
)

# Modules that need PyTorch are entered by name: evaluator, excerpts, held_out, tasks.
__all__ = [
    "MIN_DOCUMENTS", "Difference", "Evaluation", "Sample", "TaskResults", "by_source", "check_tasks", "compare",
    "evaluation_path", "evaluator", "excerpts", "held_out", "is_complete", "metric", "read_documents", "read_evaluation",
    "read_results", "read_task_results", "task_figures", "tasks", "tasks_path",
]  # fmt: skip
