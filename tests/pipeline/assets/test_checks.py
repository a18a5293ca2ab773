"""Asset checks: each passes on an intact lineage and fails on the defect it detects."""

import dataclasses
import re
from typing import Any

import dagster as dg
import pytest

from llm_core.checkpoint import RunRecord
from llm_core.corpus import load_snapshot
from llm_core.dataset import load_manifest
from llm_core.evaluation import read_evaluation
from llm_core.tokenizer import load_tokenizer
from llm_core.tokenizer.coverage import Coverage
from llm_core.tokenizer.drift import DriftReport
from llm_core.training import read_metrics
from pipeline.artifacts.pointers import get_current
from pipeline.assets import checks
from pipeline.assets.evaluation import evaluation
from pipeline.assets.raw_text import raw_text
from pipeline.assets.released_model import released_model
from pipeline.assets.trained_tokenizer import trained_tokenizer
from tests.pipeline.conftest import Home

SPECS = [
    *(*checks.RAW_TEXT_CHECKS, *checks.TRAINED_TOKENIZER_CHECKS, *checks.TOKENIZED_SHARDS_CHECKS),
    *(*checks.CHECKPOINT_CHECKS, *checks.EVALUATION_CHECKS),
]


# Only what the checks read.
EVALUATION: Any = {
    "metrics": [
        {"metric": name, "split": "val", "source": "all", "value": value}
        for name, value in {"loss": 2.0, "bits_per_byte": 3.0, "unigram_bits_per_byte": 2.0}.items()
    ]
}


def failed(results: checks.Checks) -> set[str]:
    return {result.check_name for result in results if not result.passed and result.check_name is not None}


def test_every_check_runs_and_no_blocking_check_fails_on_an_intact_lineage(trained_home: tuple[Home, Any]) -> None:
    _, result = trained_home
    made = {(e.asset_key.to_user_string(), e.check_name): e for e in result.get_asset_check_evaluations()}
    assert set(made) == {(spec.asset_key.to_user_string(), spec.name) for spec in SPECS}
    assert {name for (_, name), e in made.items() if not e.passed} <= {"beats_unigram"}, "six steps learn little"
    assert all(spec.description for spec in SPECS)
    assert all(e.metadata for e in made.values())


def test_lost_bytes_and_text_in_both_splits_are_detected(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    snapshot = load_snapshot(home.folders.prepared.root, get_current(home.folders.prepared.current_snapshot, "raw_text").stem)
    lossy = dataclasses.replace(snapshot, summary=snapshot.summary | {"bytes_kept": snapshot.summary["bytes_kept"] - 1})
    assert failed(checks.check_raw_text(lossy)) == {"bytes_add_up"}
    rows = snapshot.documents.to_pylist()
    twice = [*rows, next(row for row in rows if row["status"] == "kept") | {"split": "val"}]
    twice += [next(row for row in rows if row["status"] == "kept") | {"split": "train"}]
    both = dataclasses.replace(snapshot, documents=type(snapshot.documents).from_pylist(twice, snapshot.documents.schema))
    assert failed(checks.check_raw_text(both)) == {"splits_are_disjoint"}


def test_a_tokenizer_that_loses_text_or_has_drifted_is_detected(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    artifact = load_tokenizer(home.folders.prepared.root)

    def problems(max_drift: float | None = None, **fields: Any) -> set[str]:
        report = DriftReport(**{"drift": None, "sources": [], "round_trips": 100, "changed": {}} | fields)
        return failed(checks.check_trained_tokenizer(dataclasses.replace(artifact, drift_report=report), max_drift))

    assert not problems() and not problems(drift=0.1)
    assert problems(drift=0.5) == {"fertility_drift"}
    assert problems(drift=0.1, max_drift=0.05) == {"fertility_drift"}, "the configured limit applies"
    assert not problems(drift=0.5, max_drift=0.6)
    assert problems(changed={"an id": "Some text"}) == {"round_trip"}
    little, much = ([{"source": "ko", "bytes": 100, "unknown": share}] for share in (0.01, 0.02))
    assert not problems(coverage=Coverage(0.01, little))
    assert problems(coverage=Coverage(0.001, much)) == {"coverage"}, "one source is enough"


def test_much_dropped_text_is_detected_and_explained(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    snapshot = load_snapshot(home.folders.prepared.root, get_current(home.folders.prepared.current_snapshot, "raw_text").stem)
    kept = snapshot.summary["bytes_kept"]

    def results(size: int) -> checks.Checks:
        fields = {"bytes_read": kept + size, "bytes_dropped": {"not_utf8": size}, "documents_dropped": {"not_utf8": 1}}
        return checks.check_raw_text(dataclasses.replace(snapshot, summary=snapshot.summary | fields))

    assert not failed(results(kept // 20))
    assert failed(results(kept // 10)) == {"text_is_kept"}
    assert checks.may_continue(results(kept // 10)), "a warning"
    (shown,) = [result.metadata for result in results(kept // 10) if result.check_name == "text_is_kept"]
    assert "9.1% not_utf8 (invalid_utf8 replace keeps it)" in str(shown["dropped"])


def test_a_failed_check_that_does_not_end_the_run_gives_its_reason_in_the_log(
    trained_home: tuple[Home, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    home, result = trained_home
    reason = "bits per byte are no better than 6.0 of token frequencies alone; train for more steps"
    assert [re.sub(r"\d\.\d+", "6.0", line) for line in home.messages(result) if line.startswith("beats_unigram")] == [
        f"beats_unigram: 6.0 {reason}"
    ], "once"
    capfd.readouterr()
    home.materialize(evaluation, released_model)
    below_the_table = capfd.readouterr().out.rpartition("-----\n")[2]
    assert re.fullmatch(rf"warning: evaluation.beats_unigram: \d\.\d+ {reason.replace('6.0', r'[0-9.]+')}\n", below_the_table)


def test_every_check_that_does_not_end_the_run_has_a_reason() -> None:
    failing = [*checks.check_evaluation(EVALUATION, 1.0, 0.1)]
    warnings = [result for result in failing if not result.passed and result.severity == dg.AssetCheckSeverity.WARN]
    assert {result.check_name: result.description for result in warnings} == {
        "beats_unigram": "3.0000 bits per byte are no better than 2.0000 of token frequencies alone; train for more steps",
        "no_regression": "3.0000 bits per byte are 2.0000 worse than the released model; max_regression is 0.1",
    }


def test_a_dataset_without_one_of_its_documents_is_detected(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    snapshot = load_snapshot(home.folders.prepared.root, get_current(home.folders.prepared.current_snapshot, "raw_text").stem)
    manifest = load_manifest(home.folders.prepared.root)
    short = manifest.model_copy(update={"shards": [shard.model_copy(update={"removed_rows": [0]}) for shard in manifest.shards]})
    assert failed(checks.check_tokenized_shards(short, snapshot)) == {"totals_add_up"}


def test_a_diverged_training_is_detected(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    folder = home.folders.run(home.metadata(result, "checkpoint")["run_id"])
    run, metrics = RunRecord.read(folder.root), read_metrics(folder.metrics)
    assert not failed(checks.check_checkpoint(run, metrics, 400))
    assert failed(checks.check_checkpoint(run.model_copy(update={"skipped_steps": 3}), metrics, 400)) == {"losses_are_finite"}
    lost = [line | {"val_loss": None} if line["kind"] == "eval" else line for line in metrics]
    assert failed(checks.check_checkpoint(run, lost, 400)) == {"losses_are_finite"}
    assert failed(checks.check_checkpoint(run, metrics, 40_000)) == {"first_loss"}
    assert not failed(checks.check_checkpoint(run.model_copy(update={"parent_run_id": "another"}), metrics, 40_000))


def test_a_bad_model_is_detected(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    result = read_evaluation(get_current(home.folders.current_evaluation, "evaluation"))
    values = {entry["metric"]: entry for entry in result["metrics"] if entry["source"] == "all"}
    values["bits_per_byte"]["value"] = 9.0
    assert failed(checks.check_evaluation(result, None, 0.1)) == {"beats_unigram"}
    assert failed(checks.check_evaluation(result, 8.95, 0.1)) == {"beats_unigram"}
    assert failed(checks.check_evaluation(result, 8.5, 0.1)) == {"beats_unigram", "no_regression"}
    values["bits_per_byte"]["value"] = float("nan")
    assert "figures_are_finite" in failed(checks.check_evaluation(result, None, 0.1))


def test_a_failed_blocking_check_ends_the_run(
    trained_home: tuple[Home, Any], clone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = clone(trained_home)
    original = checks.check_raw_text
    changed = "pipeline.assets.raw_text.check_raw_text"
    monkeypatch.setattr(changed, lambda snapshot: [result._replace(passed=False) for result in original(snapshot)])
    result = home.materialize(raw_text, trained_tokenizer, expect_success=False)
    assert {e.step_key for e in result.all_events if e.is_step_failure} == {"raw_text"}
    assert not [e for e in result.all_events if e.is_step_materialization and e.step_key == "trained_tokenizer"]
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert "bytes_add_up" in str(failure.event_specific_data)
