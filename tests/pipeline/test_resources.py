"""What a run's configuration says of the resources holds for all that the run writes."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipeline.catalog.catalog import Catalog
from pipeline.definitions import defs
from tests.pipeline.conftest import TINY


def test_the_home_of_a_runs_configuration_is_that_of_its_catalog_too(
    corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # where the default home, ./data, would come to lie
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


def test_the_catalog_is_waited_for_as_long_as_its_option_says(corpus_dir: Path, tmp_path: Path) -> None:
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
