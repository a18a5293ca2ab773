"""Unattended: while `dagster dev` runs, a file is added to the folder and a new model is released."""

import json
import shutil
from pathlib import Path

import dagster as dg
import pytest
from dagster_graphql import DagsterGraphQLClientError

from pipeline.automation.sensors import SECONDS_BETWEEN_TICKS
from pipeline.catalog.catalog import Catalog
from tests.pipeline.conftest import TINY
from tests.support.dagster_dev import dagster_dev

# Three ticks (the file may arrive right after one) and the run itself.
SECONDS = 3 * SECONDS_BETWEEN_TICKS + 180


@pytest.mark.slow
def test_a_dropped_file_becomes_a_released_model(corpus_dir: Path, tmp_path: Path) -> None:
    home, dagster_home = tmp_path / "home", tmp_path / "dagster_home"
    dagster_home.mkdir()
    raw = home / "raw_text_data"
    raw.mkdir(parents=True)
    (home / "configs").mkdir()
    ops = {name: {"config": options} for name, options in TINY.items()}
    (home / "configs" / "retrain.yaml").write_text(json.dumps({"ops": ops}))  # JSON is YAML
    with dagster_dev(home, dagster_home) as server:
        for job, assets in (("pretrain", None), ("__ASSET_JOB", ["checkpoint"])):
            with pytest.raises(DagsterGraphQLClientError, match=r"checkpoint.dropout 5.0: Input should be less than 1"):
                server.launch({"ops": {"checkpoint": {"config": {"dropout": 5.0}}}}, job, assets)
        assert server.runs() == [], "what the launchpad refuses is no run"
        server.switch_on("new_raw_text")
        shutil.copytree(corpus_dir, raw, dirs_exist_ok=True)
        run = server.wait_for_run(0, SECONDS)
        assert run.status == dg.DagsterRunStatus.SUCCESS, server.log()
        assert run.tags["dagster/sensor_name"] == "new_raw_text"
    (model,) = Catalog(home / "catalog.duckdb").query("SELECT * FROM models")
    assert (home / "models" / model["model_id"] / "model.safetensors").is_file()
    assert len(server.runs()) == 1, "one run for the change"
