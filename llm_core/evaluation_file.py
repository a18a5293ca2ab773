"""The judgement of a checkpoint as a file beside it, readable without loading a model."""

from pathlib import Path
from typing import Any, TypedDict, cast

from llm_core.checkpoint_files import CheckpointRecord
from llm_core.config import EvaluateConfig
from llm_core.files import read_json
from llm_core.identity import evaluation_id


class Metric(TypedDict):
    """One figure over one part of the held-out text; source "all" is the whole of it."""

    metric: str
    split: str
    source: str
    value: float


class Sample(TypedDict):
    """What the model wrote after a prompt."""

    prompt: str
    continuation: str


class Evaluation(TypedDict):
    """One checkpoint judged on the held-out text of one dataset."""

    format_version: int
    evaluation_id: str
    checkpoint_id: str
    run_id: str
    step: int
    dataset_id: str
    config: dict[str, Any]
    created_at: str
    metrics: list[Metric]
    samples: list[Sample]


def evaluation_path(record: CheckpointRecord, dataset_id: str, config: EvaluateConfig) -> Path:
    """Where the judgement of a checkpoint on a dataset is kept: beside the checkpoint, named by all it depends on."""
    return record.path.with_name(f"evaluation_step_{record.step}_{evaluation_id(record.checkpoint_id, dataset_id, config)}.json")


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
