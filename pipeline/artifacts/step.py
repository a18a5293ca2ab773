"""What every step of the lineage works with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from llm_core.layout import Home
from pipeline.catalog.catalog import Catalog
from pipeline.processes import tools
from pipeline.resources import CatalogResource, Storage


@dataclass(frozen=True)
class Step:
    """A step of a Dagster run, the home it works on, and the catalog of that home."""

    context: dg.AssetExecutionContext
    storage: Storage
    catalog_resource: CatalogResource

    def __post_init__(self) -> None:
        self.storage.use(self.data_dir)

    @property
    def log(self) -> Any:
        return self.context.log

    @property
    def home(self) -> Home:
        return self.storage.folders

    @property
    def data_dir(self) -> Path:
        """The folder of prepared data."""
        return self.home.prepared.root

    def catalog(self, at_most: float = math.inf) -> Catalog:
        """The catalog. at_most: seconds to wait for others that have it open."""
        return self.catalog_resource.open(self.storage, at_most)

    def run_tool(self, module: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        """Runs one of llm_core's tools; see `tools.run_tool`."""
        tools.run_tool(self.context, module, options, environment)
