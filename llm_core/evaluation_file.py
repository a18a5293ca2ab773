"""The judgement of a checkpoint as a file beside it, readable without loading a model."""

from pathlib import Path
from typing import Any, TypedDict, cast

from llm_core.checkpoint_files import CheckpointRecord
from llm_core.config import EvaluateConfig, HarnessConfig
from llm_core.files import read_json
from llm_core.identity import evaluation_id, harness_id
from llm_core.shards import DatasetManifest


class Metric(TypedDict):
    """One figure over one part of the held-out text; source "all" is the whole of it. Of the harness: over a task, its source."""

    metric: str
    split: str
    source: str
    value: float


class Sample(TypedDict):
    """What the model wrote after a prompt."""

    prompt: str
    continuation: str


class Evaluation(TypedDict):
    """One checkpoint judged on the held-out text of one dataset.

    Or by tasks of the harness: its dataset_id is "lm_eval", and there is no snapshot.
    """

    format_version: int
    evaluation_id: str
    checkpoint_id: str
    run_id: str
    step: int
    dataset_id: str
    snapshot_id: str
    config: dict[str, Any]
    created_at: str
    metrics: list[Metric]
    samples: list[Sample]


def evaluation_path(record: CheckpointRecord, manifest: DatasetManifest, config: EvaluateConfig) -> Path:
    """Where the judgement of a checkpoint on a dataset is kept: beside the checkpoint, named by all it depends on."""
    return record.path.with_name(f"evaluation_step_{record.step}_{evaluation_id(record.checkpoint_id, manifest, config)}.json")


def harness_path(record: CheckpointRecord, config: HarnessConfig) -> Path:
    """Where the judgement of a checkpoint by tasks of the harness is kept: likewise."""
    return record.path.with_name(f"evaluation_step_{record.step}_{harness_id(record.checkpoint_id, config)}.json")


def read_evaluation(path: Path) -> Evaluation:
    """Raises DataError where the file is missing or damaged."""
    return cast(Evaluation, read_json(path))


def metric(evaluation: Evaluation, name: str) -> float:
    """One figure over the whole held-out text."""
    return next(entry["value"] for entry in evaluation["metrics"] if entry["metric"] == name and entry["source"] == "all")


def by_source(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each source of the held-out text, its figures by name; none where all text is of one source."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in evaluation["metrics"]:
        if entry["source"] != "all":
            rows.setdefault(entry["source"], {"source": entry["source"]})[entry["metric"]] = entry["value"]
    return list(rows.values())


def task_figures(evaluation: Evaluation) -> list[dict[str, Any]]:
    """A row for each figure of the harness: task, metric, value, standard_error (None: unknown), examples (None: a group)."""
    figures = {(entry["source"], entry["metric"]): entry["value"] for entry in evaluation["metrics"]}
    rows = []
    for (task, name), value in figures.items():
        measure, comma, filtered = name.partition(",")
        if name != "examples" and not measure.endswith("_stderr"):
            error = figures.get((task, f"{measure}_stderr{comma}{filtered}"))
            rows.append({"task": task, "metric": name, "value": value, "standard_error": error})
            rows[-1]["examples"] = figures.get((task, "examples"))
    return rows
