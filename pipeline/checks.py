"""Asset checks: what must be true of each stage's result before the next one spends hours on it.

Each is made in the step of its asset, from figures that are at hand. A blocking check that fails ends the run there.
"""

import math
from typing import Any

import dagster as dg
import pyarrow.compute as pc

from llm_core.corpus import Snapshot
from llm_core.evaluation_file import Evaluation, metric
from llm_core.shards import DatasetManifest
from llm_core.tokenizer_store import TokenizerArtifact
from pipeline.assets.common import rounded

MAX_DRIFT = 0.2
MAX_SKIPPED_SHARE = 0.05
FIRST_LOSS_TOLERANCE = 0.3

Checks = list[dg.AssetCheckResult]


def _spec(asset: str, name: str, description: str, blocking: bool = False) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset, description=description, blocking=blocking)


RAW_TEXT = [
    _spec("raw_text", "bytes_add_up", "Every byte that was read is kept, or dropped under a reason.", blocking=True),
    _spec("raw_text", "splits_are_disjoint", "No text stands both in the training and the validation split.", blocking=True),
]
TRAINED_TOKENIZER = [
    _spec("trained_tokenizer", "round_trip", "Documents come back from their tokens as they were.", blocking=True),
    _spec(
        "trained_tokenizer",
        "fertility_drift",
        f"New text has at most retrain_on_drift (not set: {MAX_DRIFT:.0%}) fewer bytes per token than the text it was made for.",
    ),
]
TOKENIZED_SHARDS = [
    _spec("tokenized_shards", "totals_add_up", "The dataset holds the snapshot's documents, all of them.", blocking=True),
]
CHECKPOINT = [
    _spec(
        "checkpoint",
        "losses_are_finite",
        f"The losses are finite, and at most {MAX_SKIPPED_SHARE:.0%} of the steps were skipped.",
        blocking=True,
    ),
    _spec("checkpoint", "first_loss", "A model that starts from nothing begins near ln(vocabulary)."),
]
EVALUATION = [
    _spec("evaluation", "figures_are_finite", "Loss and bits per byte of the held-out text are finite.", blocking=True),
    _spec("evaluation", "beats_unigram", "The model predicts the held-out text better than token frequencies do."),
    _spec("evaluation", "no_regression", "The model is at most max_regression bits per byte worse than the released one."),
]


def raw_text(snapshot: Snapshot) -> Checks:
    summary = snapshot.summary
    dropped = sum(summary["bytes_dropped"].values())
    kept = snapshot.kept_documents()
    train, val = (set(kept.filter(pc.equal(kept["split"], split))["document_id"].to_pylist()) for split in ("train", "val"))
    counts = {"bytes_read": summary["bytes_read"], "bytes_kept": summary["bytes_kept"], "bytes_dropped": dropped}
    return [
        _result(summary["bytes_read"] == summary["bytes_kept"] + dropped, "bytes_add_up", counts),
        _result(not train & val, "splits_are_disjoint", {"train": len(train), "validation": len(val), "both": len(train & val)}),
    ]


def trained_tokenizer(artifact: TokenizerArtifact, max_drift: float | None) -> Checks:
    """max_drift: the configured `retrain_on_drift`, beyond which the tokenizer was made anew."""
    trial = artifact.trial
    shown: dict[str, Any] = {"documents": trial.round_trips, "changed": len(trial.changed)}
    if trial.changed:
        shown["first"] = next(iter(trial.changed.values()))
    limit = MAX_DRIFT if max_drift is None else max_drift
    return [
        _result(not trial.changed, "round_trip", shown),
        _result((trial.drift or 0.0) <= limit, "fertility_drift", {"drift": drift_of(artifact), "limit": limit}, warn_only=True),
    ]


def drift_of(artifact: TokenizerArtifact) -> float | str:
    """By which share new text has fewer bytes per token than the text it was made for, or why there is no such number."""
    if artifact.replaced_drift is not None:
        return f"{artifact.replaced_drift:.1%} with the one before: trained again"
    if artifact.trial.drift is None:
        return "no new text since it was made, or nobody knows which is new"
    return round(artifact.trial.drift, 4)


def tokenized_shards(manifest: DatasetManifest, snapshot: Snapshot) -> Checks:
    kept = snapshot.kept_documents()
    facts: dict[str, Any] = {}
    right = True
    for split, totals in manifest.splits.items():
        wanted = kept.filter(pc.equal(kept["split"], split))
        stored = sum(shard.documents - len(shard.removed_rows) for shard in manifest.shards if shard.split == split)
        most = sum(shard.tokens for shard in manifest.shards if shard.split == split)
        right &= totals.documents == wanted.num_rows == stored and totals.documents < totals.tokens <= most
        right &= totals.bytes == (pc.sum(wanted["bytes"]).as_py() or 0)
        facts |= {f"{split}_documents": totals.documents, f"{split}_documents_in_snapshot": wanted.num_rows}
        facts |= {f"{split}_tokens": totals.tokens, f"{split}_tokens_in_shards": most}
    return [_result(right, "totals_add_up", facts)]


def checkpoint(state: dict[str, Any], metrics: list[dict[str, Any]], vocab_size: int) -> Checks:
    losses = [line["loss"] for line in metrics if line["kind"] == "train"]
    held_out = [line["val_loss"] for line in metrics if line["kind"] == "eval"]
    skipped = state["skipped_steps"] / max(1, state["steps_done"])
    finite = losses[-1] is not None and None not in held_out and skipped <= MAX_SKIPPED_SHARE
    facts = {"last_loss": losses[-1], "validation_loss": held_out[-1], "skipped_steps": state["skipped_steps"]}
    expected, first = math.log(vocab_size), losses[0]
    if state["parent_run_id"] is not None:
        began = _result(True, "first_loss", {"not_applicable": "the weights are those of another run"}, warn_only=True)
    else:
        near = first is not None and abs(first - expected) <= FIRST_LOSS_TOLERANCE
        began = _result(
            near,
            "first_loss",
            {"first_loss": rounded(first), "ln_vocabulary": rounded(expected)},
            warn_only=True,
        )
    return [_result(finite, "losses_are_finite", facts), began]


def evaluation(result: Evaluation, released: float | None, max_regression: float) -> Checks:
    """released: bits per byte of the released model on the same text, if there is one."""
    loss, found, unigram = (metric(result, name) for name in ("loss", "bits_per_byte", "unigram_bits_per_byte"))
    facts = {"bits_per_byte": round(found, 4)}
    worse = found - released if released is not None else 0.0
    return [
        _result(math.isfinite(loss) and math.isfinite(found), "figures_are_finite", {"loss": loss} | facts),
        _result(found < unigram, "beats_unigram", facts | {"unigram_bits_per_byte": round(unigram, 4)}, warn_only=True),
        _result(worse <= max_regression, "no_regression", facts | {"worse_by": round(worse, 4)}, warn_only=True),
    ]


def may_go_on(results: Checks) -> bool:
    """Whether no check failed that ends the run."""
    return all(result.passed or result.severity == dg.AssetCheckSeverity.WARN for result in results)


def _result(passed: bool, name: str, metadata: dict[str, Any], warn_only: bool = False) -> dg.AssetCheckResult:
    severity = dg.AssetCheckSeverity.WARN if warn_only else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(passed=bool(passed), check_name=name, severity=severity, metadata=metadata)
