"""Tries an exported model on tasks of EleutherAI's lm-eval (Gao et al. 2021); `python -m llm_core.harness` is the tool."""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from llm_core.cli import parse_options, run_tool
from llm_core.config import HarnessConfig
from llm_core.distributed import Ranks
from llm_core.errors import UserError
from llm_core.evaluation_file import Evaluation, Metric, task_figures
from llm_core.files import read_json, write_json
from llm_core.identity import harness_id
from llm_core.runlog import now

PROG = "python -m llm_core.harness"
_BOOTSTRAP = 1000
"""Resamplings for the errors of metrics without a formula; the harness's own 100,000 take longer than a small model."""


class HarnessOptions(HarnessConfig):
    """Try an exported model on tasks of EleutherAI's lm-eval."""

    model_dir: str = Field(description="A Hugging Face directory that the export wrote.")
    output_file: str | None = Field(None, description="JSON file for the figures; default: they are only printed.")


def evaluate_tasks(model_dir: Path, config: HarnessConfig) -> Evaluation:
    """Runs the harness on an exported model: each figure under the name of its task, with its standard error where it has one.

    Raises:
        UserError: lm-eval is not installed, a task is unknown or cannot be loaded, or `model_dir` is no export.
    """
    if not config.lm_eval_tasks:
        raise UserError("--lm_eval_tasks []: name at least one; `lm_eval ls tasks` lists them")
    if config.lm_eval_task_dir is not None and not Path(config.lm_eval_task_dir).is_dir():
        raise UserError(f"--lm_eval_task_dir {config.lm_eval_task_dir}: no such folder")
    if not (model_dir / "textmill.json").is_file():
        raise UserError(f"--model_dir {model_dir}: not an exported model; `python -m llm_core.export` writes one")
    facts = read_json(model_dir / "textmill.json")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # left open, each process that a task forks warns of it
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--lm_eval_tasks {', '.join(config.lm_eval_tasks)}: the harness is not installed ({error}); "
            'pip install -c constraints.txt -e ".[lm-eval]"'
        ) from error
    manager = TaskManager(include_path=config.lm_eval_task_dir)
    for name in config.lm_eval_tasks:
        _load(manager, name)
    ranks = Ranks.alone()
    torch.set_num_threads(ranks.threads)
    model = HFLM(
        str(model_dir),
        device=str(ranks.device),
        dtype="float32",
        batch_size=config.lm_eval_batch_size,
        add_bos_token=True,  # a document begins with the end-of-text token, which is the tokenizer's bos_token
    )
    found = simple_evaluate(
        model,
        tasks=list(config.lm_eval_tasks),
        limit=config.lm_eval_limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
        task_manager=manager,
    )
    return {
        "format_version": 1,
        "evaluation_id": harness_id(facts["checkpoint_id"], config),
        "checkpoint_id": facts["checkpoint_id"],
        "run_id": facts["run_id"],
        "step": facts["step"],
        "dataset_id": "lm_eval",
        "snapshot_id": "",
        "config": config.model_dump(mode="json"),
        "created_at": now(),
        "metrics": list(_metrics(found)),
        "samples": [],
    }


def _load(manager: Any, name: str) -> None:
    """Raises UserError where the harness does not know the task or cannot get its data."""
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            f"--lm_eval_tasks {name}: no such task; {meant}`lm_eval ls tasks` lists them, and --lm_eval_task_dir adds your own"
        )
    try:
        manager.load([name])
    except Exception as error:  # whatever a definition, the hub or the reader of its data may raise
        raise UserError(f"--lm_eval_tasks {name}: cannot be loaded ({type(error).__name__}: {error})") from error


def _metrics(found: Mapping[str, Any]) -> Iterator[Metric]:
    """The harness's figures, `acc_stderr,none` say, as ours: the filter is named only where there is one."""
    for task, figures in found["results"].items():
        definition = found["configs"].get(task)
        split = "group" if definition is None else "test" if definition.get("test_split") else "validation"
        for name, value in figures.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, int | float):
                yield {
                    "metric": metric if filtered == "none" else f"{metric},{filtered}",
                    "split": split,
                    "source": task,
                    "value": float(value),
                }
        if task in found["n-samples"]:
            yield {"metric": "examples", "split": split, "source": task, "value": float(found["n-samples"][task]["effective"])}


def main() -> None:
    options = parse_options(HarnessOptions, PROG)
    result = evaluate_tasks(Path(options.model_dir), options.part(HarnessConfig))
    if options.output_file is not None:
        write_json(Path(options.output_file), result)
    print(f"{'task':<30} {'metric':<24} {'value':>9} {'std. error':>10} {'examples':>9}")
    for row in task_figures(result):
        error, examples = ("" if row[name] is None else row[name] for name in ("standard_error", "examples"))
        print(f"{row['task']:<30} {row['metric']:<24} {row['value']:9.4f} {error:10.4} {examples:9.6}")


if __name__ == "__main__":
    run_tool(main, PROG)
