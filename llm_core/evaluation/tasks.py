"""Evaluates an exported model on tasks of EleutherAI's lm-eval (Gao et al. 2021)."""

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from llm_core.artifact_ids import tasks_id
from llm_core.config import TasksConfig
from llm_core.distributed.ranks import Ranks
from llm_core.errors import UserError
from llm_core.evaluation.results import TaskFigure, TaskResults, check_tasks
from llm_core.system import now

# Resamplings for standard errors without a formula. lm-eval's default of 100,000 takes longer than a small model.
_BOOTSTRAP = 1000


def evaluate_tasks(model_dir: Path, checkpoint_id: str, run_id: str, step: int, config: TasksConfig) -> TaskResults:
    """Runs lm-eval on the exported model of a checkpoint.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown or cannot be loaded.
    """
    check_tasks(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if unset, each forked process warns
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--lm_eval_tasks {', '.join(config.lm_eval_tasks)}: lm-eval is not installed ({error}); "
            'pip install -c constraints.txt -e ".[lm-eval]"'
        ) from error
    manager = _task_manager(TaskManager, config)
    ranks = Ranks.alone()
    torch.set_num_threads(ranks.threads)
    model = _model_class(HFLM)(
        str(model_dir),
        device=str(ranks.device),
        dtype="float32",
        batch_size=config.lm_eval_batch_size,
        add_bos_token=True,  # a document begins with the end-of-text token, which is the tokenizer's bos_token
    )
    output = simple_evaluate(
        model,
        tasks=list(config.lm_eval_tasks),
        limit=config.lm_eval_limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
        task_manager=manager,
    )
    return {
        "format_version": 2,
        "evaluation_id": tasks_id(checkpoint_id, config),
        "checkpoint_id": checkpoint_id,
        "run_id": run_id,
        "step": step,
        "config": config.model_dump(mode="json"),
        "created_at": now(),
        "figures": list(_figures(output)),
    }


def _model_class(base: Any) -> Any:
    """lm-eval's model class, with one end-of-text token in front of a rolling text: lm-eval puts it there itself."""

    class Model(base):  # type: ignore[misc]
        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.add_bos_token = True

    return Model


def _task_manager(manager_class: Any, config: TasksConfig) -> Any:
    """lm-eval's index of tasks, which has all that are asked for.

    Its own 14,000 tasks take 14 s to index: they are left out if the user's folder has all that is needed.

    Raises:
        UserError: a task is unknown or its data cannot be loaded.
    """
    folder = config.lm_eval_task_dir
    if folder is not None:
        manager = manager_class(include_path=folder, include_defaults=False)
        with suppress(Exception):  # a task, or one that it is made of, is not in the folder
            manager.load(config.lm_eval_tasks)
            return manager
    manager = manager_class(include_path=folder)
    for name in config.lm_eval_tasks:
        _load(manager, name)
    return manager


def _load(manager: Any, name: str) -> None:
    """Raises UserError if lm-eval does not know the task or cannot load its data."""
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            f"--lm_eval_tasks {name}: no such task; {meant}`lm_eval ls tasks` lists them, and --lm_eval_task_dir adds your own"
        )
    try:
        manager.load([name])
    except Exception as error:  # a definition, the hub or a data reader can raise anything
        raise UserError(f"--lm_eval_tasks {name}: cannot be loaded ({type(error).__name__}: {error})") from error


def _figures(output: Mapping[str, Any]) -> Iterator[TaskFigure]:
    """lm-eval's metrics, such as `acc_stderr,none`, without the filter "none"."""
    for task, metrics in output["results"].items():
        definition = output["configs"].get(task)
        split = "group" if definition is None else "test" if definition.get("test_split") else "validation"
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if filtered and isinstance(value, int | float):
                shown = metric if filtered == "none" else f"{metric},{filtered}"
                yield {"task": task, "split": split, "metric": shown, "value": float(value)}
        if task in output["n-samples"]:
            examples = output["n-samples"][task]["effective"]
            yield {"task": task, "split": split, "metric": "examples", "value": float(examples)}
