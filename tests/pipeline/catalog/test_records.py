"""The catalog has each row of the files once; a damaged file is reported by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from llm_core.errors import DataError, UserError
from llm_core.system import read_json, write_json
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogError
from tests.support.artifacts import NASTY, Artifacts, contents, document_id


def test_every_table_has_the_rows_of_the_files(catalog: Catalog) -> None:
    counts = {table: len(rows) for table, rows in contents(catalog).items()}
    documents = len(NASTY)
    assert counts == {
        "snapshots": 1,
        "documents": documents,
        "snapshot_documents": documents + 1,
        "tokenizers": 1,
        "shards": 2,
        "shard_documents": documents,
        "datasets": 1,
        "dataset_shards": 2,
        "training_runs": 1,
        "train_metrics": 4,
        "run_documents": documents - 1,
        "checkpoints": 2,
        "evaluations": 2,
        "models": 1,
        # The checkpoint at step 2 was trained on the documents of step 0 (three, one of them in two files), the last one on all.
        "checkpoint_lineage": 4 + documents,
        "document_usage": 3 + documents - 1,
    }


def test_paths_with_special_characters_are_recorded_as_they_are(catalog: Catalog) -> None:
    assert {row["path"] for row in catalog.query("SELECT path FROM documents")} == set(NASTY)
    (used,) = [row for row in catalog.usage(NASTY[3]) if row["step"] == 4]
    assert used["documents"] == 1


@pytest.mark.parametrize("folder", ["it's", "path=elsewhere", "a[1]*b", "two\nlines", "with block in it"])
def test_a_home_may_have_any_name(folder: str, tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path / folder)
    artifacts.full_lineage(["one.txt", "two.txt"])
    catalog = Catalog(artifacts.home / "catalog.duckdb")
    artifacts.record_all(catalog)
    assert {row["path"] for row in catalog.query("SELECT path FROM documents")} == {"one.txt", "two.txt"}


def test_times_are_stored_in_utc(catalog: Catalog) -> None:
    (row,) = catalog.query("SELECT DISTINCT evaluated_at::VARCHAR AS t FROM evaluations")
    assert row["t"] == "2026-01-02 03:00:00"


def test_dropped_ignored_and_unknown_text_is_recorded_and_unknown_in_older_files(catalog: Catalog, artifacts: Artifacts) -> None:
    (row,) = catalog.query("SELECT documents_dropped, files_ignored, files_skipped FROM snapshots")
    assert [json.loads(value) for value in row.values()] == [{"duplicate": 1}, {".pdf": 2}, {"link_to_folder": 3}]
    assert catalog.query("SELECT unknown_text FROM datasets") == [{"unknown_text": 0.25}]
    artifacts.snapshot("older", ["a.txt", "b.txt"])
    path = artifacts.processed / "snapshots" / "older.json"
    later = ("documents_dropped", "ignored_by_extension", "files_skipped", "sha256_of_the_rest")
    write_json(path, {name: value for name, value in read_json(path).items() if name not in later})
    catalog.record_snapshot(artifacts.processed, "older")
    query = "SELECT documents_dropped, files_ignored, files_skipped FROM snapshots WHERE snapshot_id = 'older'"
    assert catalog.query(query) == [{"documents_dropped": None, "files_ignored": None, "files_skipped": None}]


def test_recording_again_changes_nothing(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    artifacts.record_all(catalog)
    assert contents(catalog) == before


def test_a_document_has_its_first_path_whatever_the_order_of_recording(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    for age, (snapshot_id, split_of_text) in enumerate([("new", ["x.txt", "text"]), ("old", ["text", "y.txt"])]):
        artifacts.snapshot(snapshot_id, split_of_text)
        os.utime(artifacts.processed / "snapshots" / f"{snapshot_id}.json", (1000 - age, 1000 - age))
    found = []
    for order in (["new", "old"], ["old", "new"]):
        catalog = Catalog(tmp_path / f"{order[0]}.duckdb")
        for snapshot_id in order:
            catalog.record_snapshot(artifacts.processed, snapshot_id)
        found.append(catalog.query("SELECT * FROM documents ORDER BY document_id"))
    assert found[0] == found[1]
    (text,) = [row for row in found[0] if row["document_id"] == document_id("text")]
    assert text["split"] == "train", "as in the old snapshot"


def test_the_last_line_of_a_repeated_step_counts_and_a_torn_line_is_ignored(catalog: Catalog, artifacts: Artifacts) -> None:
    run_dir = artifacts.home / "checkpoints" / "run"
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 3, "tokens": 300, "loss": 0.5}) + "\n")
        file.write('{"kind": "train", "step": 5, "tok')
    catalog.record_run(run_dir)
    rows = catalog.query("SELECT step, loss, val_loss FROM train_metrics ORDER BY step")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 4.0), (2, 3.0), (3, 0.5), (4, 1.0)]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [2, 4]


def test_a_deleted_checkpoint_is_recorded_as_deleted(catalog: Catalog, artifacts: Artifacts) -> None:
    run_dir = artifacts.home / "checkpoints" / "run"
    (run_dir / "checkpoint_step_2.pt.json").unlink()
    (run_dir / "checkpoint_step_2.pt").unlink()
    catalog.record_run(run_dir)
    rows = catalog.query("SELECT step, on_disk FROM checkpoints ORDER BY step")
    assert rows == [{"step": 2, "on_disk": False}, {"step": 4, "on_disk": True}]


def test_a_run_with_a_damaged_checkpoint_manifest_is_recorded(catalog: Catalog, artifacts: Artifacts) -> None:
    run_dir = artifacts.home / "checkpoints" / "run"
    (run_dir / "checkpoint_step_2.pt.json").write_text('{"format_version": 1}')
    catalog.record_run(run_dir)
    rows = catalog.query("SELECT step, on_disk FROM checkpoints ORDER BY step")
    assert rows == [{"step": 2, "on_disk": False}, {"step": 4, "on_disk": True}]


def test_a_dataset_with_a_rewritten_manifest_is_recorded_as_in_the_file(catalog: Catalog, artifacts: Artifacts) -> None:
    artifacts.dataset("data", "another snapshot", "tok", NASTY)
    catalog.record_dataset(artifacts.processed, "data")
    assert catalog.query("SELECT snapshot_id FROM datasets") == [{"snapshot_id": "another snapshot"}]


def lose_fields(path: Path) -> None:
    write_json(path, {"format_version": 1})


def change_types(path: Path) -> None:
    write_json(path, {name: [] for name in read_json(path)})


def flip_bits(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(byte ^ 0x55 for byte in content[4:]))


MANIFESTS = [
    "processed_data/snapshots/snap.json",
    "processed_data/tokenizers/tok.report.json",
    "processed_data/manifests/data.json",
    "checkpoints/run/evaluation_step_4_e0.json",
    "models/model/textmill.json",
]
RUN_STATE = "checkpoints/run/run.json"
DATA_TABLES = ["processed_data/snapshots/snap.documents.parquet", "processed_data/dataset/train*.parquet"]
RUN_FILES = ["checkpoints/run/metrics.jsonl", "checkpoints/run/document_steps.parquet"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in (*MANIFESTS, RUN_STATE) for damage in (lose_fields, change_types, flip_bits)),
        *((name, flip_bits) for name in (*DATA_TABLES, *RUN_FILES)),
        # Not the files of a run: a run that has not started has none.
        *((name, Path.unlink) for name in (*MANIFESTS, *DATA_TABLES)),
    ],
)
def test_a_damaged_artifact_is_reported_and_leaves_the_catalog_unchanged(
    name: str, damage: Callable[[Path], None], artifacts: Artifacts
) -> None:
    (path,) = artifacts.home.glob(name)
    damage(path)
    catalog = Catalog(artifacts.home / "catalog.duckdb")
    with pytest.raises(DataError) as caught:
        artifacts.record_all(catalog)
    assert path.name in str(caught.value)
    assert not isinstance(caught.value, CatalogError), "the catalog itself is fine"
    if path.parent.name == "run" and name not in MANIFESTS:
        assert catalog.query("SELECT * FROM checkpoints") == [], "a run is recorded completely or not at all"


def test_a_snapshot_of_100_000_documents_is_recorded(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    artifacts.snapshot("snap", [f"folder/file {number}.txt" for number in range(100_000)])
    catalog = Catalog(tmp_path / "catalog.duckdb")
    catalog.record_snapshot(artifacts.processed, "snap")
    assert catalog.query("SELECT count(*) AS n FROM documents") == [{"n": 100_000}]


def test_a_query_cannot_write(catalog: Catalog) -> None:
    with pytest.raises(duckdb.Error, match="read-only"):
        catalog.query("DELETE FROM documents")


def test_a_query_does_not_create_a_catalog(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such catalog"):
        Catalog(tmp_path / "home" / "catalog.duckdb").runs()
    assert list(tmp_path.iterdir()) == []
