"""Asset checks: each passes on a sound lineage, and fails on what it is there to find."""

import dataclasses
from typing import Any

import pytest

from llm_core.corpus import load_snapshot
from llm_core.evaluation_file import read_evaluation
from llm_core.files import read_json
from llm_core.runlog import read_metrics
from llm_core.shards import load_manifest
from llm_core.tokenizer_store import load_tokenizer
from llm_core.tokenizer_trial import Trial
from pipeline import checks
from pipeline.assets.raw_text import raw_text
from pipeline.assets.trained_tokenizer import trained_tokenizer
from pipeline.current import get_current
from tests.pipeline.conftest import Home

SPECS = [*checks.RAW_TEXT, *checks.TRAINED_TOKENIZER, *checks.TOKENIZED_SHARDS, *checks.CHECKPOINT, *checks.EVALUATION]


def failed(results: checks.Checks) -> set[str]:
    return {result.check_name for result in results if not result.passed and result.check_name is not None}


def test_every_check_of_a_sound_lineage_is_made_and_none_that_blocks_fails(trained_home: tuple[Home, Any]) -> None:
    _, result = trained_home
    made = {(e.asset_key.to_user_string(), e.check_name): e for e in result.get_asset_check_evaluations()}
    assert set(made) == {(spec.asset_key.to_user_string(), spec.name) for spec in SPECS}
    assert {name for (_, name), e in made.items() if not e.passed} <= {"beats_unigram"}, "six steps learn little"
    assert all(spec.description for spec in SPECS)
    assert all(e.metadata for e in made.values())


def test_bytes_that_are_lost_and_text_on_both_sides_are_found(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    snapshot = load_snapshot(home.storage.processed, get_current(home.storage.current_snapshot, "raw_text").stem)
    lossy = dataclasses.replace(snapshot, summary=snapshot.summary | {"bytes_kept": snapshot.summary["bytes_kept"] - 1})
    assert failed(checks.raw_text(lossy)) == {"bytes_add_up"}
    rows = snapshot.documents.to_pylist()
    twice = [*rows, next(row for row in rows if row["status"] == "kept") | {"split": "val"}]
    twice += [next(row for row in rows if row["status"] == "kept") | {"split": "train"}]
    both = dataclasses.replace(snapshot, documents=type(snapshot.documents).from_pylist(twice, snapshot.documents.schema))
    assert failed(checks.raw_text(both)) == {"splits_are_disjoint"}


def test_a_tokenizer_that_loses_text_or_has_drifted_is_found(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    made = load_tokenizer(home.storage.processed)

    def found(max_drift: float | None = None, **trial: Any) -> set[str]:
        result = Trial(**{"drift": None, "sources": [], "round_trips": 100, "changed": {}} | trial)
        return failed(checks.trained_tokenizer(dataclasses.replace(made, trial=result), max_drift))

    assert not found() and not found(drift=0.1)
    assert found(drift=0.5) == {"fertility_drift"}
    assert found(drift=0.1, max_drift=0.05) == {"fertility_drift"}, "the configured share decides"
    assert not found(drift=0.5, max_drift=0.6)
    assert found(changed={"an id": "Some text"}) == {"round_trip"}


def test_a_dataset_that_lacks_a_document_is_found(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    snapshot = load_snapshot(home.storage.processed, get_current(home.storage.current_snapshot, "raw_text").stem)
    manifest = load_manifest(home.storage.processed)
    short = manifest.model_copy(update={"shards": [shard.model_copy(update={"removed_rows": [0]}) for shard in manifest.shards]})
    assert failed(checks.tokenized_shards(short, snapshot)) == {"totals_add_up"}


def test_a_training_that_went_wrong_is_found(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    run_dir = home.storage.checkpoints / home.metadata(result, "checkpoint")["run_id"]
    state, metrics = read_json(run_dir / "run.json"), read_metrics(run_dir / "metrics.jsonl")
    assert not failed(checks.checkpoint(state, metrics, 400))
    assert failed(checks.checkpoint(state | {"skipped_steps": 3}, metrics, 400)) == {"losses_are_finite"}
    lost = [line | {"val_loss": None} if line["kind"] == "eval" else line for line in metrics]
    assert failed(checks.checkpoint(state, lost, 400)) == {"losses_are_finite"}
    assert failed(checks.checkpoint(state, metrics, 40_000)) == {"first_loss"}
    assert not failed(checks.checkpoint(state | {"parent_run_id": "another"}, metrics, 40_000))


def test_a_model_that_is_no_good_is_found(trained_home: tuple[Home, Any]) -> None:
    home, _ = trained_home
    result = read_evaluation(get_current(home.storage.current_evaluation, "evaluation"))
    values = {entry["metric"]: entry for entry in result["metrics"] if entry["source"] == "all"}
    values["bits_per_byte"]["value"] = 9.0
    assert failed(checks.evaluation(result, None, 0.1)) == {"beats_unigram"}
    assert failed(checks.evaluation(result, 8.95, 0.1)) == {"beats_unigram"}
    assert failed(checks.evaluation(result, 8.5, 0.1)) == {"beats_unigram", "no_regression"}
    values["bits_per_byte"]["value"] = float("nan")
    assert "figures_are_finite" in failed(checks.evaluation(result, None, 0.1))


def test_a_blocking_check_that_fails_ends_the_run_there(
    trained_home: tuple[Home, Any], clone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = clone(trained_home)
    original = checks.raw_text
    monkeypatch.setattr(checks, "raw_text", lambda snapshot: [result._replace(passed=False) for result in original(snapshot)])
    result = home.materialize(raw_text, trained_tokenizer, expect_success=False)
    assert {e.step_key for e in result.all_events if e.is_step_failure} == {"raw_text"}
    assert not [e for e in result.all_events if e.is_step_materialization and e.step_key == "trained_tokenizer"]
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    assert "bytes_add_up" in str(failure.event_specific_data)
