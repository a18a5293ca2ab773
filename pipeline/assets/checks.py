"""Asset checks: what must hold for each stage's result before the next stage spends hours on it.

Checks run in the step of their asset. A blocking check that fails ends the run.
"""

import logging
import math
from typing import Any

import dagster as dg
import pyarrow.compute as pc

from llm_core.checkpoint import RunRecord
from llm_core.corpus import WARN_DROPPED, Snapshot, drop_warning, dropped_text
from llm_core.dataset import DatasetManifest
from llm_core.evaluation import Evaluation, metric
from llm_core.tokenizer import MAX_DRIFT, WARN_UNKNOWN, TokenizerArtifact
from pipeline.failures import in_run_config
from pipeline.presentation import rounded

MAX_SKIPPED_SHARE = 0.05
FIRST_LOSS_TOLERANCE = 0.3

DRIFT_REMEDY = (
    "retrain_tokenizer: true of trained_tokenizer trains a new tokenizer on the current text, once; retrain_on_drift does so "
    "whenever the drift is above it. Models of the old tokenizer stay usable, but training cannot continue from them."
)

Checks = list[dg.AssetCheckResult]


def _spec(asset: str, name: str, description: str, blocking: bool = False) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(name, asset=asset, description=description, blocking=blocking)


RAW_TEXT_CHECKS = [
    _spec("raw_text", "bytes_add_up", "Every byte read is kept, or dropped for a reason.", blocking=True),
    _spec("raw_text", "splits_are_disjoint", "No text is in both the training and the validation split.", blocking=True),
    _spec("raw_text", "text_is_kept", f"At most {WARN_DROPPED:.0%} of the text is dropped, markup aside."),
]
TRAINED_TOKENIZER_CHECKS = [
    _spec("trained_tokenizer", "round_trip", "Documents are unchanged after encoding and decoding.", blocking=True),
    _spec(
        "trained_tokenizer",
        "fertility_drift",
        f"New text has at most retrain_on_drift (default {MAX_DRIFT:.0%}) fewer bytes per token than the training text.",
    ),
    _spec("trained_tokenizer", "coverage", f"The tokenizer can spell {1 - WARN_UNKNOWN:.0%} of the text of each source."),
]
TOKENIZED_SHARDS_CHECKS = [
    _spec("tokenized_shards", "totals_add_up", "The dataset has all documents of the snapshot.", blocking=True),
]
CHECKPOINT_CHECKS = [
    _spec(
        "checkpoint",
        "losses_are_finite",
        f"The losses are finite, and at most {MAX_SKIPPED_SHARE:.0%} of the steps were skipped.",
        blocking=True,
    ),
    _spec("checkpoint", "first_loss", "A model trained from scratch starts near ln(vocabulary)."),
]
EVALUATION_CHECKS = [
    _spec("evaluation", "figures_are_finite", "Loss and bits per byte of the held-out text are finite.", blocking=True),
    _spec("evaluation", "beats_unigram", "The model predicts held-out text better than token frequencies do."),
    _spec("evaluation", "no_regression", "The model is at most max_regression bits per byte worse than the released one."),
]


def check_raw_text(snapshot: Snapshot) -> Checks:
    summary = snapshot.summary
    dropped = sum(summary["bytes_dropped"].values())
    kept = snapshot.kept_documents()
    train, val = (set(kept.filter(pc.equal(kept["split"], split))["document_id"].to_pylist()) for split in ("train", "val"))
    counts = {"bytes_read": summary["bytes_read"], "bytes_kept": summary["bytes_kept"], "bytes_dropped": dropped}
    shares: dict[str, Any] = {each["reason"]: round(each["share"], 4) for each in dropped_text(summary)}
    warning = in_run_config(drop_warning(summary) or "")
    return [
        _result(summary["bytes_read"] == summary["bytes_kept"] + dropped, "bytes_add_up", counts),
        _result(not train & val, "splits_are_disjoint", {"train": len(train), "validation": len(val), "both": len(train & val)}),
        _warning(not warning, "text_is_kept", {"dropped": warning or f"at most {WARN_DROPPED:.0%}"} | shares, warning),
    ]


def check_trained_tokenizer(artifact: TokenizerArtifact, max_drift: float | None) -> Checks:
    """max_drift: the configured `retrain_on_drift`."""
    drift_report = artifact.drift_report
    shown: dict[str, Any] = {"documents": drift_report.round_trips, "changed": len(drift_report.changed)}
    if drift_report.changed:
        shown["first"] = next(iter(drift_report.changed.values()))
    limit = MAX_DRIFT if max_drift is None else max_drift
    drift, coverage = drift_report.drift or 0.0, drift_report.coverage
    fits = drift <= limit
    remedy = {} if fits else {"remedy": DRIFT_REMEDY}
    return [
        _result(not drift_report.changed, "round_trip", shown),
        _warning(
            fits,
            "fertility_drift",
            {"drift": drift_of(artifact), "limit": limit} | remedy,
            f"new text has {drift:.1%} fewer bytes per token than the training text, more than {limit:.0%}; {DRIFT_REMEDY}",
        ),
        _warning(
            not coverage.is_low,
            "coverage",
            {"unknown": round(coverage.unknown, 4), "text": str(coverage)},
            f"the tokenizer cannot spell {coverage}; tokenizer_type bpe of trained_tokenizer spells all of it",
        ),
    ]


def drift_of(artifact: TokenizerArtifact) -> float | str:
    """How much fewer bytes per token new text has than the training text, as a share; or why there is no such number."""
    if artifact.text_gone:
        return "none of the text that the previous tokenizer was trained on remains: trained again"
    if artifact.replaced_drift is not None:
        return f"{artifact.replaced_drift:.1%} with the previous tokenizer: trained again"
    if artifact.drift_report.drift is None:
        return "no new text, or the training snapshot is gone"
    return round(artifact.drift_report.drift, 4)


def check_tokenized_shards(manifest: DatasetManifest, snapshot: Snapshot) -> Checks:
    kept = snapshot.kept_documents()
    shown: dict[str, Any] = {}
    complete = True
    for split, totals in manifest.splits.items():
        wanted = kept.filter(pc.equal(kept["split"], split))
        stored = sum(shard.documents - len(shard.removed_rows) for shard in manifest.shards if shard.split == split)
        tokens_in_shards = sum(shard.tokens for shard in manifest.shards if shard.split == split)
        complete &= totals.documents == wanted.num_rows == stored and totals.documents < totals.tokens <= tokens_in_shards
        complete &= totals.bytes == (pc.sum(wanted["bytes"]).as_py() or 0)
        shown |= {f"{split}_documents": totals.documents, f"{split}_documents_in_snapshot": wanted.num_rows}
        shown |= {f"{split}_tokens": totals.tokens, f"{split}_tokens_in_shards": tokens_in_shards}
    return [_result(complete, "totals_add_up", shown)]


def check_checkpoint(run: RunRecord, metrics: list[dict[str, Any]], vocab_size: int) -> Checks:
    losses = [line["loss"] for line in metrics if line["kind"] == "train"]
    held_out = [line["val_loss"] for line in metrics if line["kind"] == "eval"]
    skipped = run.skipped_steps / max(1, run.steps_done)
    finite = losses[-1] is not None and None not in held_out and skipped <= MAX_SKIPPED_SHARE
    shown = {"last_loss": losses[-1], "validation_loss": held_out[-1], "skipped_steps": run.skipped_steps}
    expected, first = math.log(vocab_size), losses[0]
    if run.parent_run_id is not None:
        began = _warning(True, "first_loss", {"not_applicable": "the run started from the weights of another run"}, "")
    else:
        near = first is not None and abs(first - expected) <= FIRST_LOSS_TOLERANCE
        began = _warning(
            near,
            "first_loss",
            {"first_loss": rounded(first), "ln_vocabulary": rounded(expected)},
            f"the first loss is {rounded(first)}, not near ln(vocabulary) {rounded(expected)}, where an untrained model starts",
        )
    return [_result(finite, "losses_are_finite", shown), began]


def check_evaluation(result: Evaluation, released: float | None, max_regression: float) -> Checks:
    """released: bits per byte of the released model on the same text; None if there is none."""
    loss, value, unigram = (metric(result, name) for name in ("loss", "bits_per_byte", "unigram_bits_per_byte"))
    shown = {"bits_per_byte": round(value, 4)}
    worse = value - released if released is not None else 0.0
    return [
        _result(math.isfinite(loss) and math.isfinite(value), "figures_are_finite", {"loss": loss} | shown),
        _warning(
            value < unigram,
            "beats_unigram",
            shown | {"unigram_bits_per_byte": round(unigram, 4)},
            f"{value:.4f} bits per byte are no better than {unigram:.4f} of token frequencies alone; train for more steps",
        ),
        _warning(
            worse <= max_regression,
            "no_regression",
            shown | {"worse_by": round(worse, 4)},
            f"{value:.4f} bits per byte are {worse:.4f} worse than the released model; max_regression is {max_regression:g}",
        ),
    ]


def may_continue(results: Checks) -> bool:
    """Whether no blocking check failed."""
    return all(result.passed or result.severity == dg.AssetCheckSeverity.WARN for result in results)


def warned(log: logging.Logger, results: Checks) -> Checks:
    """The results, after a line in the log for each failed check that does not end the run: Dagster logs only its name."""
    for result in results:
        if not result.passed and result.severity == dg.AssetCheckSeverity.WARN:
            log.warning(f"{result.check_name}: {result.description}")
    return results


def _result(passed: bool, name: str, metadata: dict[str, Any]) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=bool(passed), check_name=name, metadata=metadata)


def _warning(passed: bool, name: str, metadata: dict[str, Any], reason: str) -> dg.AssetCheckResult:
    """A check that does not end the run. reason: why it fails."""
    return dg.AssetCheckResult(
        passed=bool(passed),
        check_name=name,
        severity=dg.AssetCheckSeverity.WARN,
        metadata=metadata,
        description=None if passed else reason,
    )
