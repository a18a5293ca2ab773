"""The lineage on a real Dagster instance, in a small home."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from llm_core.evaluation import read_evaluation
from llm_core.layout import Home as Folders
from llm_core.system import write_json
from pipeline.automation.jobs import LINEAGE
from pipeline.automation.run_config import check_before_launch
from pipeline.catalog.catalog import Catalog
from pipeline.resources import CatalogResource, Storage, Torchrun

check_before_launch()  # as in every process that loads the definitions

TINY: dict[str, dict[str, Any]] = {
    "raw_text": {"max_document_bytes": 4096, "val_fraction": 0.2},
    "trained_tokenizer": {"vocab_size": 400},
    "tokenized_shards": {"max_length": 32, "num_workers": 1},
    "checkpoint": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "eval_interval": 3,
        "eval_tokens": 256,
        "save_interval": 3,
        "device": "cpu",
    },
    "evaluation": {"max_eval_tokens": 512, "sample_tokens": 4},
}


class Home:
    """One textmill home and the jobs run in it.

    Most tests run them on an instance that keeps its records in memory: writing them to disk takes Dagster longer than the rest
    of its work. Tests of runs in several processes, of the command and of the web UI have an instance on disk.
    """

    def __init__(self, root: Path, instance: dg.DagsterInstance, release_line: str | None = None) -> None:
        self.storage = Storage(home=str(root), release_line=release_line)
        self.catalog = Catalog(root / "catalog.duckdb")
        self.torchrun = Torchrun(report_seconds=0.5, stop_seconds=30, catalog_seconds=0.5)
        self._instance = instance

    @property
    def folders(self) -> Folders:
        return self.storage.folders

    def materialize(self, *assets: dg.AssetsDefinition, expect_success: bool = True, **overrides: dict[str, Any]) -> Any:
        """Runs the lineage, or part of it, with the tiny configuration. overrides: asset name -> options."""
        chosen = list(assets) or LINEAGE
        names = {asset.key.to_user_string() for asset in chosen}
        config = {name: {"config": TINY.get(name, {}) | overrides.get(name, {})} for name in names}
        result = dg.materialize(
            LINEAGE,
            selection=[asset.key for asset in chosen],
            instance=self._instance,
            resources={
                "storage": self.storage,
                "catalog": CatalogResource(),
                "torchrun": self.torchrun,
            },
            run_config={"ops": config},
            raise_on_error=False,
        )
        assert result.success == expect_success
        return result

    def make_the_evaluation_not_finite(self) -> None:
        (path,) = self.folders.checkpoints.glob("*/evaluation_step_6_*.json")
        result = read_evaluation(path)
        for entry in result["metrics"]:
            entry["value"] = math.nan
        write_json(path, result)

    def messages(self, result: Any) -> list[str]:
        """The log of a run, as its page shows it."""
        return [entry.user_message for entry in self._instance.all_logs(result.run_id)]

    def metadata(self, result: Any, asset: str) -> dict[str, Any]:
        (event,) = [
            e for e in result.all_events if e.is_step_materialization and e.asset_key is not None and e.asset_key.path == [asset]
        ]
        return {name: value.value for name, value in event.materialization.metadata.items()}


@pytest.fixture(scope="session")
def make_home(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Home]:
    def make() -> Home:
        root = tmp_path_factory.mktemp("home")
        shutil.copytree(corpus_dir, root / "raw_text_data")
        return Home(root, dg.DagsterInstance.ephemeral())

    return make


@pytest.fixture(scope="session")
def trained_home(make_home: Callable[[], Home]) -> tuple[Home, Any]:
    """A home in which the whole lineage ran once, and the result of that run. Tests `clone` it to change it."""
    home = make_home()
    return home, home.materialize()


@pytest.fixture
def clone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[Home, Any]], tuple[Home, Any]]:
    """Copies a home for a test that changes it."""

    def copy(source: tuple[Home, Any]) -> tuple[Home, Any]:
        home, result = source
        root = tmp_path_factory.mktemp("clone") / "home"
        shutil.copytree(home.folders.root, root, copy_function=shutil.copy2)
        return Home(root, dg.DagsterInstance.ephemeral()), result

    return copy
