"""`python -m llm_core.evaluate_tasks`: evaluates an exported model on tasks of EleutherAI's lm-eval."""

from llm_core.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

from pathlib import Path

from pydantic import Field

from llm_core.cli import parse_options, run_tool
from llm_core.config import TasksConfig
from llm_core.errors import UserError
from llm_core.evaluation import task_figures
from llm_core.evaluation.tasks import evaluate_tasks
from llm_core.huggingface import ModelRecord
from llm_core.layout import ModelFolder
from llm_core.system import write_json

PROG = "python -m llm_core.evaluate_tasks"


class EvaluateTasksOptions(TasksConfig):
    """Evaluate an exported model on tasks of EleutherAI's lm-eval."""

    model_dir: str = Field(description="A Hugging Face directory written by llm_core.export.")
    output_file: str | None = Field(None, description="JSON file for the results; default: only print them.")


def main() -> None:
    options = parse_options(EvaluateTasksOptions, PROG)
    model_dir = Path(options.model_dir)
    if not ModelFolder(model_dir).record.is_file():
        raise UserError(f"--model_dir {model_dir}: not an exported model; `python -m llm_core.export` writes one")
    model = ModelRecord.read(model_dir)
    result = evaluate_tasks(model_dir, model.checkpoint_id, model.run_id, model.step, options.stage(TasksConfig))
    if options.output_file is not None:
        write_json(Path(options.output_file), result)
    print(f"{'task':<30} {'metric':<24} {'value':>9} {'std. error':>10} {'examples':>9}")
    for row in task_figures(result):
        error, examples = ("" if row[name] is None else row[name] for name in ("standard_error", "examples"))
        print(f"{row['task']:<30} {row['metric']:<24} {row['value']:9.4f} {error:10.4} {examples:9.6}")


if __name__ == "__main__":
    run_tool(main, PROG, "no result was written; run it again to evaluate")
