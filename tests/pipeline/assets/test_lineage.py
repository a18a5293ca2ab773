"""The whole lineage on a real Dagster instance, with real torchrun and DuckDB: what a rerun repeats and what it reuses."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch

from llm_core.checkpoint.state import load_model
from pipeline.assets.checkpoint import checkpoint
from pipeline.assets.evaluation import evaluation
from pipeline.assets.raw_text import raw_text
from pipeline.assets.released_model import released_model
from pipeline.assets.tokenized_shards import tokenized_shards
from pipeline.assets.trained_tokenizer import trained_tokenizer
from tests.pipeline.conftest import Home

IDS = {
    "raw_text": "snapshot_id",
    "trained_tokenizer": "tokenizer_id",
    "tokenized_shards": "dataset_id",
    "checkpoint": "checkpoint_id",
    "released_model": "model_id",
}
LINEAGE_TO_CHECKPOINT = [raw_text, trained_tokenizer, tokenized_shards, checkpoint]


def ids(home: Home, result: Any) -> dict[str, str]:
    return {asset: home.metadata(result, asset)[name] for asset, name in IDS.items()}


def files_of(home: Home) -> dict[str, tuple[int, int]]:
    """Inode and mtime of every file under the home, except the catalog and locks."""
    return {
        str(path.relative_to(home.folders.root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in home.folders.root.rglob("*")
        if path.is_file() and path.name != ".lock" and "catalog.duckdb" not in path.name
    }


def test_one_run_goes_from_raw_text_to_a_released_model(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    model = home.metadata(result, "released_model")
    directory = Path(model["directory"])
    assert model["promoted"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "textmill.json"} <= {
        path.name for path in directory.iterdir()
    }
    trained = home.metadata(result, "checkpoint")
    assert trained["steps"] == 6
    assert not trained["reused"]
    assert trained["loss_curve"].startswith("![loss curve](data:image/png;base64,")
    assert home.metadata(result, "evaluation")["bits_per_byte"] > 0


def test_the_catalog_agrees_with_the_files(trained_home: tuple[Home, Any]) -> None:
    home, result = trained_home
    found = ids(home, result)
    lineage = home.catalog.lineage(found["checkpoint"])
    assert {(row["snapshot_id"], row["tokenizer_id"], row["dataset_id"]) for row in lineage} == {
        (found["raw_text"], found["trained_tokenizer"], found["tokenized_shards"])
    }
    raw_files = {str(path.relative_to(home.storage.raw_text)) for path in home.storage.raw_text.rglob("*.txt")}
    assert {row["path"] for row in lineage} <= raw_files
    steps = home.catalog.query("SELECT step, loss, val_loss FROM train_metrics ORDER BY step")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in steps if row["val_loss"] is not None] == [3, 6]


def test_an_unchanged_rerun_reuses_everything_and_trains_nothing(trained_home: tuple[Home, Any], opened: list[str]) -> None:
    home, first = trained_home
    before = files_of(home)
    opened.clear()
    again = home.materialize()
    assert not opened
    assert ids(home, again) == ids(home, first)
    assert home.metadata(again, "checkpoint")["reused"]
    assert files_of(home) == before, "no file was written again"
    assert len(home.catalog.query("SELECT * FROM training_runs")) == 1


def test_one_added_file_is_the_only_one_opened_and_tokenized_and_trains_a_new_run(
    trained_home: tuple[Home, Any], clone: Any, opened: list[str]
) -> None:
    home, first = clone(trained_home)
    home.materialize(raw_text)  # the copied files have new inodes: scan them once
    opened.clear()
    text = "\n".join(f"A line about the number {number}, written for the first time in this file." for number in range(400))
    (home.storage.raw_text / "added.txt").write_text(text)
    known_shards = {row["shard_id"] for row in home.catalog.query("SELECT shard_id FROM shards")}
    again = home.materialize(*LINEAGE_TO_CHECKPOINT)
    found, known = (
        {name: home.metadata(result, name)[IDS[name]] for name in ("trained_tokenizer", "tokenized_shards", "checkpoint")}
        for result in (again, first)
    )
    assert found["trained_tokenizer"] == known["trained_tokenizer"], "the tokenizer is frozen"
    assert found["tokenized_shards"] != known["tokenized_shards"]
    assert found["checkpoint"] != known["checkpoint"]
    new_documents = home.catalog.query(
        "SELECT DISTINCT path FROM shard_documents JOIN snapshot_documents USING (document_id) WHERE shard_id NOT IN "
        "(SELECT unnest(?))",
        [sorted(known_shards)],
    )
    assert new_documents == [{"path": "added.txt"}]
    assert set(opened) == {"added.txt"}, "each asset reads only new files, the tokenizer's drift report included"
    assert home.metadata(again, "raw_text")["files_added"] == 1
    parent = home.catalog.query("SELECT parent_dataset_id FROM datasets WHERE dataset_id = ?", [found["tokenized_shards"]])
    assert parent == [{"parent_dataset_id": known["tokenized_shards"]}]


def test_a_run_of_part_of_the_lineage_starts_from_the_current_artifacts(trained_home: tuple[Home, Any]) -> None:
    home, first = trained_home
    part = home.materialize(checkpoint, evaluation, released_model)
    assert home.metadata(part, "released_model")["model_id"] == ids(home, first)["released_model"]


def test_the_lineage_names_the_files_that_the_run_has_read(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, first = clone(trained_home)
    (home.storage.raw_text / "more").rename(home.storage.raw_text / "moved")
    weights = {"source_weights": {".": 1.0, "moved": 1.0}}
    made = home.metadata(home.materialize(*LINEAGE_TO_CHECKPOINT, checkpoint=weights), "checkpoint")
    before = home.metadata(first, "checkpoint")
    assert made["dataset_id"] == before["dataset_id"], "the same documents"
    for run, folder in ((made, "moved"), (before, "more")):
        lineage = home.catalog.lineage(run["checkpoint_id"])
        assert {row["snapshot_id"] for row in lineage} == {run["snapshot_id"]}
        assert {row["path"].split("/")[0] for row in lineage if "/" in row["path"]} == {folder}


def test_two_processes_train_the_same_model_as_one(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, first = clone(trained_home)
    run_dir = home.folders.checkpoints / home.metadata(first, "checkpoint")["run_id"]
    before, _ = load_model(run_dir / "checkpoint_step_6.pt")
    run_dir.rename(run_dir.with_name("moved"))
    home.materialize(checkpoint, checkpoint={"nproc_per_node": 2})
    after, _ = load_model(run_dir / "checkpoint_step_6.pt")
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(weight, after.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_changed_learning_rate_only_retrains_and_a_worse_model_does_not_replace_the_released_one(
    trained_home: tuple[Home, Any], clone: Any
) -> None:
    home, first = clone(trained_home)
    home.materialize(raw_text)  # the copied files have new inodes: scan them once
    files_before = files_of(home)
    again = home.materialize(checkpoint={"learning_rate": 1e-6})
    found, known = ids(home, again), ids(home, first)
    for asset in ("raw_text", "trained_tokenizer", "tokenized_shards"):
        assert found[asset] == known[asset]
    assert found["checkpoint"] != known["checkpoint"]
    touched = {path.split("/")[0] for path, identity in files_of(home).items() if files_before.get(path) != identity}
    assert touched <= {"checkpoints", "models"}

    verdict = home.metadata(again, "released_model")
    assert not verdict["promoted"]
    assert "worse, the old release stays" in verdict["reason"]
    assert verdict["model_id"] == ids(home, first)["released_model"]
    assert len(list(home.folders.models.glob("*/textmill.json"))) == 1
    shown, before = home.metadata(again, "evaluation"), home.metadata(first, "evaluation")
    assert "released_bits_per_byte" not in before, "there was none to compare with"
    assert shown["released_bits_per_byte"] == before["bits_per_byte"] < shown["bits_per_byte"]
    assert shown["improvement"].startswith("-") and shown["improvement"] in verdict["reason"]

    def is_released(**options: Any) -> dict[str, Any]:
        return home.metadata(home.materialize(evaluation, released_model, evaluation=options), "released_model")

    run_id = home.metadata(first, "checkpoint")["run_id"]
    home.folders.run(run_id).checkpoint(6).unlink()
    assert is_released()["reason"] == verdict["reason"], "the result on this text was kept"
    other_text = is_released(max_eval_tokens=256)
    assert other_text["promoted"]
    assert f"nothing to compare with: the checkpoint of the released model {verdict['model_id']}" in other_text["reason"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trained_tokenizer": {"vocab_size": 500_000}}, "vocab_size"),
        ({"checkpoint": {"source_weights": {"nowhere": 1.0}}}, 'source_weights: no source "nowhere" in this text'),
    ],
)
def test_options_that_do_not_fit_the_text_are_reported(
    overrides: dict[str, Any], message: str, trained_home: tuple[Home, Any], clone: Any
) -> None:
    home, _ = clone(trained_home)
    result = home.materialize(expect_success=False, **overrides)
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert message in str(failure.event_specific_data.error) + str(failure.event_specific_data)


def test_a_damaged_shard_ends_the_training_and_is_named(trained_home: tuple[Home, Any], clone: Any) -> None:
    home, _ = clone(trained_home)
    shard = max((home.folders.prepared.root / "dataset").glob("*.arrow"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = home.materialize(checkpoint, expect_success=False, checkpoint={"seed": 5})
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert shard.name in str(failure.event_specific_data)


def test_a_stage_without_its_input_names_the_asset_to_materialize(make_home: Any) -> None:
    home = make_home()

    def reason(asset: dg.AssetsDefinition) -> str:
        result = home.materialize(asset, expect_success=False)
        (failure,) = [event for event in result.all_events if event.is_step_failure]
        return str(failure.event_specific_data)

    assert "materialize the asset 'raw_text' first" in reason(tokenized_shards)
    assert "materialize the asset 'tokenized_shards' first" in reason(checkpoint)
    home.materialize(raw_text)
    assert "materialize the asset 'trained_tokenizer' first" in reason(tokenized_shards)


def test_an_empty_raw_text_folder_is_reported_with_where_to_put_text(make_home: Any) -> None:
    home = make_home()
    for path in sorted(home.storage.raw_text.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    result = home.materialize(expect_success=False)
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert str(home.storage.raw_text) in str(failure.event_specific_data)


def test_definitions_load_and_every_asset_is_documented() -> None:
    from pipeline.definitions import defs

    repository = defs.get_repository_def()
    assert {job.name for job in repository.get_all_jobs()} >= {"quickstart", "pretrain", "prepare_data"}
    specs = {
        spec.key.to_user_string(): spec for spec in repository.asset_graph.get_all_asset_keys() and defs.resolve_all_asset_specs()
    }
    assert set(specs) == {
        "sample_corpus",
        "raw_text",
        "trained_tokenizer",
        "tokenized_shards",
        "checkpoint",
        "evaluation",
        "released_model",
        "run_comparison",
    }
    for spec in specs.values():
        assert spec.description
        assert spec.owners
        assert spec.group_name in ("data", "model")
        assert spec.kinds


def test_automation_that_launches_runs_is_off_by_default() -> None:
    from pipeline.definitions import defs

    repository = defs.get_repository_def()
    automatic = [*repository.sensor_defs, *repository.schedule_defs]
    assert {item.name for item in automatic} == {"new_raw_text", "nightly_retraining", "lost_retries"}
    # lost_retries starts nothing new: it only repeats retries that Dagster lost.
    assert {item.name for item in automatic if item.default_status.value == "RUNNING"} == {"lost_retries"}
    assert all(item.description for item in automatic)


def test_every_launchpad_option_has_a_description_and_a_default() -> None:
    for asset in (checkpoint, tokenized_shards, evaluation, released_model):
        schema = asset.op.config_schema.config_type
        for name, field in schema.fields.items():  # type: ignore[union-attr]
            assert field.description, name
            assert not field.is_required, name
    assert dg.AssetKey("checkpoint") == checkpoint.key
