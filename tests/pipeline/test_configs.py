"""The run configurations in configs/: each fits its job, and the smallest one runs in CI."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import dagster as dg
import pytest

from llm_core.config import AUTO, MODEL_NAMES
from pipeline.assets.checkpoint import CheckpointConfig
from pipeline.catalog.catalog import Catalog
from pipeline.definitions import defs
from tests.support.dagster_dev import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def options(path: Path) -> CheckpointConfig:
    return CheckpointConfig(**dg.config_from_files([str(path)])["ops"]["checkpoint"]["config"])


def test_each_preset_has_a_configuration_and_ci_has_one() -> None:
    assert {path.stem for path in CONFIGS} == {*get_args(MODEL_NAMES), "smoke", "cpu"} - {AUTO}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_fits_its_job_and_names_its_command(path: Path) -> None:
    assert dg.validate_run_config(defs.resolve_job_def("pretrain"), dict(dg.config_from_files([str(path)])))
    assert f"dagster job execute -m pipeline.definitions -j pretrain -c configs/{path.name}\n" in path.read_text()
    line = dg.config_from_files([str(path)]).get("resources", {}).get("storage", {}).get("config", {}).get("release_line")
    assert line == (path.stem if path.stem != "smoke" else None), "sizes do not compete for one release"
    config = options(path)  # checks the bounds, which the launchpad leaves to the step
    assert config.model == (path.stem if path.stem not in ("smoke", "cpu") else AUTO)
    if config.train_minutes is None:
        assert config.batch_size % ((config.micro_batch_size or 1) * config.nproc_per_node) == 0


@pytest.mark.slow
def test_the_smoke_configuration_runs_from_text_to_a_released_model(corpus_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "raw_text_data").symlink_to(corpus_dir)
    environment = os.environ | {"TEXTMILL_HOME": str(tmp_path)}
    environment.pop("DAGSTER_HOME", None)
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "pipeline.definitions", "-j", "pretrain"]
    done = subprocess.run(
        [*command, "-c", "configs/smoke.yaml"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(Catalog(tmp_path / "catalog.duckdb").query("SELECT * FROM models")) == 1
