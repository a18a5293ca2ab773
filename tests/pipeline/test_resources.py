"""Resource options in a run configuration apply to everything that the run writes."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipeline.automation.run_config import RunConfigError
from pipeline.catalog.catalog import Catalog
from pipeline.definitions import defs
from pipeline.resources import Storage
from tests.pipeline.conftest import TINY


def test_the_catalog_is_in_the_home_of_the_run_configuration(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # where the default home, ./data, would be
    home = tmp_path / "home"
    config: dict[str, Any] = {
        "ops": {name: {"config": TINY[name]} for name in ("raw_text", "trained_tokenizer", "tokenized_shards")},
        "resources": {"storage": {"config": {"home": str(home), "raw_text_dir": str(corpus_dir)}}},
    }
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("prepare_data").execute_in_process(config, instance=instance)
    assert result.success
    rows = Catalog(home / "catalog.duckdb").query("SELECT dataset_id FROM datasets")
    assert len(rows) == 1
    assert [path.parent for path in tmp_path.rglob("catalog.duckdb")] == [home], "and nowhere else"


def test_the_wait_for_the_catalog_is_bounded_by_its_option(corpus_dir: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "ops": {"raw_text": {"config": TINY["raw_text"]}},
        "resources": {
            "storage": {"config": {"home": str(tmp_path), "raw_text_dir": str(corpus_dir)}},
            "catalog": {"config": {"wait_seconds": 0.5}},
        },
    }
    with (
        dg.DagsterInstance.ephemeral() as instance,
        Catalog(tmp_path / "catalog.duckdb")._database.connect(),
    ):
        result = defs.resolve_job_def("prepare_data").execute_in_process(config, instance=instance, raise_on_error=False)
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "busy for 0.5 seconds" in str(failure.event_specific_data)


def test_a_tilde_in_a_path_is_the_users_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = Storage(home="~/mill", raw_text_dir="~/texts")
    assert (storage.folders.root, storage.raw_text) == (tmp_path / "mill", tmp_path / "texts")


def test_a_missing_folder_of_raw_text_is_refused_before_the_run_and_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    config: dict[str, Any] = {
        "ops": {name: {"config": options} for name, options in TINY.items()},
        "resources": {"storage": {"config": {"home": "home", "raw_text_dir": "no_such_folder"}}},
    }
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(RunConfigError, match=r"storage: raw_text_dir .*/no_such_folder: no such folder"):
            defs.resolve_job_def("pretrain").execute_in_process(config, instance=instance)
        assert instance.get_runs() == []
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
