"""Records with every field filled in, for tests that need only some of them."""

from typing import Any

from llm_core.checkpoint import RunRecord
from llm_core.huggingface import ModelRecord

TIME = "2026-01-01T00:00:00.000+00:00"


def run_record(**fields: Any) -> RunRecord:
    defaults: dict[str, Any] = {
        **{name: name for name in ("run_id", "dataset_id", "tokenizer_id", "code_version", "torch_version")},
        **dict.fromkeys(("parent_run_id", "parent_step", "git_commit", "finished_at", "error")),
        **dict.fromkeys(("seed", "steps_done", "tokens_seen", "skipped_steps", "parameters", "world_size", "threads"), 1),
        **{"status": "finished", "started_at": TIME, "device": "cpu", "precision": "fp32", "attention": "sdpa"},
    }
    return RunRecord(**(defaults | fields))


def model_record(**fields: Any) -> ModelRecord:
    ids = ("model_id", "run_id", "checkpoint_id", "checkpoint_file", "dataset_id", "tokenizer_id", "code_version", "reason")
    defaults: dict[str, Any] = {name: name for name in ids} | {"git_commit": None, "released_at": TIME, "metrics": {}}
    return ModelRecord(**(defaults | dict.fromkeys(("step", "tokens_seen", "seed"), 1) | fields))
