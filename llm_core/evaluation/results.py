"""The results of an evaluation, as a file beside the checkpoint that is readable without loading a model."""

import importlib.util
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import pyarrow as pa

from llm_core.artifact_ids import evaluation_id, tasks_id
from llm_core.checkpoint import CheckpointRecord
from llm_core.config import EvaluateConfig, TasksConfig
from llm_core.dataset import DatasetManifest
from llm_core.errors import DataError, UserError
from llm_core.layout import RunFolder
from llm_core.system import atomic_writer, parquet_bytes, read_json, read_parquet, verify_file, write_json


class Metric(TypedDict):
    """One metric on the held-out text of a source; source "all" is all of the text."""

    metric: str
    split: str
    source: str
    value: float


class Sample(TypedDict):
    """Text that the model generated after a prompt."""

    prompt: str
    continuation: str


class Evaluation(TypedDict):
    """One checkpoint on the held-out text of one dataset.

    Format 1 has no `text_id`, `precision` and `documents_sha256`: it is readable, but not compared with others.
    """

    format_version: int
    evaluation_id: str
    checkpoint_id: str
    run_id: str
    step: int
    dataset_id: str
    snapshot_id: str
    text_id: NotRequired[str]  # of the text that was read
    precision: NotRequired[str]  # of the matrix products
    config: dict[str, Any]
    created_at: str
    metrics: list[Metric]
    samples: list[Sample]
    documents_sha256: NotRequired[str]  # of the file with the sums over each document


class TaskFigure(TypedDict):
    """One metric of an lm-eval task; the metric "examples" is the number of examples."""

    task: str
    split: str
    metric: str
    value: float


class TaskResults(TypedDict):
    """One checkpoint on tasks of lm-eval."""

    format_version: int
    evaluation_id: str
    checkpoint_id: str
    run_id: str
    step: int
    config: dict[str, Any]
    created_at: str
    figures: list[TaskFigure]


def evaluation_path(record: CheckpointRecord, manifest: DatasetManifest, config: EvaluateConfig) -> Path:
    """The file for a checkpoint's evaluation on a dataset; everything the result depends on is in its name. config: resolved."""
    return RunFolder(record.path.parent).evaluation(record.step, evaluation_id(record.checkpoint_id, manifest, config))


def tasks_path(record: CheckpointRecord, config: TasksConfig) -> Path:
    """The file for a checkpoint's task results."""
    return RunFolder(record.path.parent).evaluation(record.step, tasks_id(record.checkpoint_id, config))


def read_evaluation(path: Path) -> Evaluation:
    """Raises DataError where the file is missing or damaged."""
    return cast(Evaluation, read_json(path))


def write_evaluation(path: Path, evaluation: Evaluation, documents: pa.Table) -> Evaluation:
    """Writes an evaluation and, first, its sums over each document; returns it with the digest of these.

    documents: document_id, text (that it is a piece of), nats (over what was predicted) and bytes of that.
    """
    with atomic_writer(_documents_path(path, evaluation)) as file:
        file.write(parquet_bytes(documents))
        evaluation = {**evaluation, "documents_sha256": file.sha256()}
    write_json(path, evaluation)
    return evaluation


def read_documents(path: Path) -> pa.Table:
    """The sums over each document of the evaluation at `path`: document_id, text, nats, bytes.

    Raises:
        DataError: a file is missing or damaged, or the evaluation is of a version that did not store them.
    """
    evaluation = read_evaluation(path)
    if "documents_sha256" not in evaluation:
        raise DataError(f"{path}: made by an older version, without sums over each document; delete it to evaluate again")
    documents = _documents_path(path, evaluation)
    verify_file(documents, evaluation["documents_sha256"])
    return read_parquet(documents)


def is_complete(path: Path) -> bool:
    """Whether there is an intact evaluation at `path`, with its sums over each document."""
    try:
        read_documents(path)
    except DataError:
        return False
    return True


def _documents_path(path: Path, evaluation: Evaluation) -> Path:
    return RunFolder(path.parent).evaluation_documents(evaluation["step"], evaluation["evaluation_id"])


def read_results(path: Path) -> Evaluation | TaskResults:
    """An evaluation of either kind.

    Raises:
        DataError: the file is missing or damaged.
    """
    value = read_json(path)
    if value.get("dataset_id") != "lm_eval":
        return cast(Evaluation | TaskResults, value)
    # Format 1 stored task results as an evaluation on a dataset "lm_eval", with the task as the source.
    kept = {name: item for name, item in value.items() if name in TaskResults.__required_keys__}
    figures: list[TaskFigure] = [
        {"task": entry["source"], "split": entry["split"], "metric": entry["metric"], "value": entry["value"]}
        for entry in value["metrics"]
    ]
    return cast(TaskResults, kept | {"format_version": 2, "figures": figures})


def read_task_results(path: Path) -> TaskResults:
    """Raises DataError where the file is missing or damaged."""
    return cast(TaskResults, read_results(path))


def metric(evaluation: Evaluation, name: str) -> float:
    """A metric on all of the held-out text."""
    return next(entry["value"] for entry in evaluation["metrics"] if entry["metric"] == name and entry["source"] == "all")


def by_source(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row of metrics for each source; none if all text is from one source."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in evaluation["metrics"]:
        if entry["source"] != "all":
            rows.setdefault(entry["source"], {"source": entry["source"]})[entry["metric"]] = entry["value"]
    return list(rows.values())


def task_figures(results: TaskResults) -> list[dict[str, Any]]:
    """A row for each metric: task, metric, value, standard_error (None: unknown), examples (None for a group)."""
    values = {(entry["task"], entry["metric"]): entry["value"] for entry in results["figures"]}
    rows = []
    for (task, name), value in values.items():
        base, comma, filtered = name.partition(",")
        if name != "examples" and not base.endswith("_stderr"):
            error = values.get((task, f"{base}_stderr{comma}{filtered}"))
            examples = values.get((task, "examples"))
            rows.append({"task": task, "metric": name, "value": value, "standard_error": error, "examples": examples})
    return rows


def check_tasks(config: TasksConfig) -> None:
    """Raises UserError if no task is named, the folder of own tasks is missing, or lm-eval is not installed."""
    if not config.lm_eval_tasks:
        raise UserError("--lm_eval_tasks []: name at least one; `lm_eval ls tasks` lists them")
    if config.lm_eval_task_dir is not None and not Path(config.lm_eval_task_dir).is_dir():
        raise UserError(f"--lm_eval_task_dir {config.lm_eval_task_dir}: no such folder")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"--lm_eval_tasks {', '.join(config.lm_eval_tasks)}: lm-eval is not installed; "
            'pip install -c constraints.txt -e ".[lm-eval]"'
        )
