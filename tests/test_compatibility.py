"""What earlier versions wrote opens in this one. `tests/fixtures/README.md` says how each archive was made."""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch
import yaml

from llm_core.checkpoint import CheckpointRecord, RunRecord
from llm_core.checkpoint.state import load_checkpoint
from llm_core.layout import Home, RunFolder, checkpoint_manifest
from llm_core.system import sha256_file
from pipeline.artifacts.retention import collect_home
from pipeline.automation.jobs import LINEAGE
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.rebuild import rebuild
from pipeline.resources import CatalogResource, Storage, Torchrun
from tests.support.training import run_train

FIXTURES = Path(__file__).parent / "fixtures"
TABLES = ("snapshots", "tokenizers", "datasets", "training_runs", "checkpoints", "evaluations", "models")


def unpack(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / name) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(unpack("home-0.1.0.tar.xz", tmp_path))


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("checkpoint-0.1.0.tar.xz", tmp_path_factory.mktemp("checkpoint"))


def pretrain(home: Home, tmp_path: Path, config: str) -> Any:
    """Runs the lineage with one of the run configurations in a home; returns the metadata of each asset."""
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        result = dg.materialize(
            LINEAGE,
            instance=instance,
            resources={"storage": Storage(home=str(home.root)), "catalog": CatalogResource(), "torchrun": Torchrun()},
            run_config=yaml.safe_load((home.root / config).read_text()),
        )
    return {
        event.asset_key.to_user_string(): {name: value.value for name, value in event.materialization.metadata.items()}
        for event in result.all_events
        if event.is_step_materialization and event.asset_key is not None
    }


def test_a_home_of_version_0_1_is_reused_with_nothing_trained_again(home: Home, tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = [*home.checkpoints.glob("*/*.pt"), *home.models.rglob("*.safetensors"), *home.prepared.shards()]
    before = {path: (sha256_file(path), path.stat().st_mtime_ns) for path in kept}
    runs = {run.root for run in home.runs()}
    made = pretrain(home, tmp_path_factory.mktemp("instance"), "continue.yaml")
    assert {path: (sha256_file(path), path.stat().st_mtime_ns) for path in kept} == before
    assert {run.root for run in home.runs()} == runs
    assert made["checkpoint"]["reused"] is True
    assert made["checkpoint"]["run_id"] in {run.name for run in runs}
    assert made["released_model"]["reason"] == "this checkpoint is the released model already"


def test_the_catalog_of_version_0_1_opens_and_a_rebuild_gives_the_same_rows(home: Home) -> None:
    catalog = Catalog(home.catalog)
    catalog.create()
    before = rows(catalog)
    assert all(before.values())
    newest = catalog.runs()[0]
    lineage = catalog.lineage(newest["checkpoint_id"])
    assert {row["generation"] for row in lineage} == {0, 1}
    assert {"readme.md", "docs/diary.md"} <= {row["path"] for row in lineage}
    assert rebuild(home.root, home.catalog) == []
    assert rows(catalog) == before


def rows(catalog: Catalog) -> dict[str, list[str]]:
    """All rows of some tables, without two columns of a snapshot.

    An archive keeps whole seconds of its time. What was skipped is in the files of version 0.1, but not in its catalog.
    """
    columns = {"snapshots": "* EXCLUDE (taken_at, files_skipped)"}
    return {table: sorted(map(str, catalog.query(f"SELECT {columns.get(table, '*')} FROM {table}"))) for table in TABLES}


def test_a_run_of_version_0_1_resumes_to_the_weights_it_ended_with(home: Home, run_dir: Path) -> None:
    ended = load_checkpoint(RunFolder(run_dir).checkpoint(6))
    for path in (RunFolder(run_dir).checkpoint(6), checkpoint_manifest(RunFolder(run_dir).checkpoint(6))):
        path.unlink()
    record = RunRecord.read(run_dir)
    assert (record.format_version, record.steps_done) == (1, 6)
    options: dict[str, Any] = record.train_config(run_dir)
    shape = {
        name: options[name] for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "batch_size", "max_steps")
    }
    intervals = {"save_interval": 3, "eval_interval": 3, "eval_tokens": 256}
    run_train(
        home.prepared.root,
        run_dir,
        dataset_id=record.dataset_id,
        resume="auto",
        warmup_steps=options["warmup_steps"],
        learning_rate=options["learning_rate"],
        **shape,
        **intervals,
    )
    resumed = load_checkpoint(CheckpointRecord.of(RunFolder(run_dir).checkpoint(6)).path)
    assert resumed["run_id"] == ended["run_id"]
    for name, weight in ended["model"].items():
        torch.testing.assert_close(
            resumed["model"][name], weight, rtol=1e-4, atol=1e-5
        )  # bit for bit on one type of machine only
    assert (RunRecord.read(run_dir).format_version, RunRecord.read(run_dir).status) == (2, "finished")


def test_a_lost_catalog_of_version_0_1_is_made_again_from_the_files(home: Home) -> None:
    shutil.move(home.catalog, home.root / "lost")
    assert rebuild(home.root, home.catalog) == []
    assert len(Catalog(home.catalog).runs()) == 2


def test_garbage_collection_in_a_home_of_version_0_1_loses_no_row(home: Home) -> None:
    catalog = Catalog(home.catalog)
    catalog.create()
    before = rows(catalog)
    newest, oldest = (row["run_id"] for row in catalog.runs())
    found = collect_home(home, keep_runs=1, delete=True, log=pytest.fail)
    assert [(candidate.kind, candidate.kept) for candidate in found.candidates] == [
        ("run", "released (default)"),
        ("run", f"parent of {newest}"),
        ("model", "released (default)"),
        ("model", None),
    ]
    RunRecord.mark_removed(home.run(oldest).root, "a snapshot")  # of format 1, which has the configuration in run.json
    catalog.record_run(home.run(oldest).root)
    after = rows(catalog)
    assert {table: len(lines) for table, lines in after.items()} == {table: len(lines) for table, lines in before.items()}
    assert after["checkpoints"] == before["checkpoints"]
    assert {row["run_id"]: row["removed_at"] is not None for row in catalog.runs()} == {newest: False, oldest: True}
    assert rebuild(home.root, home.catalog) == []
    assert rows(catalog) == after
