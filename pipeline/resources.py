"""What the assets share: where things lie, the catalog, and how training is launched."""

import math
import os
import re
from pathlib import Path

import dagster as dg
from pydantic import Field

from llm_core.corpus import InputDir, is_url
from llm_core.errors import UserError
from pipeline.catalog.catalog import Catalog


class Storage(dg.ConfigurableResource):
    """The folders of one textmill home; every path the pipeline uses comes from here."""

    home: str = Field(
        default_factory=lambda: os.environ.get("TEXTMILL_HOME", "data"), description="Root of everything textmill writes."
    )
    raw_text_dir: str | None = Field(
        default=None, description="Folder of the raw text, or its URL (s3://...); default: raw_text_data under the home."
    )
    release_line: str | None = Field(
        default=None,
        description="Name of a line of models that are released, compared and continued among themselves, such as one for each "
        "model size; default: one line for all.",
    )

    @property
    def root(self) -> Path:
        """Raises UserError if the release line has no proper name.

        Looked at here, in the first step: what a resource itself refuses, Dagster takes for a crash and tries again.
        """
        if self.release_line is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.release_line):
            raise UserError(
                f"storage.release_line {self.release_line}: not a name; take letters, digits, '.', '_' and '-', a letter or "
                "digit first"
            )
        return Path(self.home).expanduser().resolve()

    @property
    def raw_text(self) -> InputDir:
        """Where the raw text lies: a resolved path, or a URL as it was given."""
        if self.raw_text_dir and is_url(self.raw_text_dir):
            return self.raw_text_dir
        return Path(self.raw_text_dir).expanduser().resolve() if self.raw_text_dir else self.root / "raw_text_data"

    @property
    def processed(self) -> Path:
        return self.root / "processed_data"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def current_snapshot(self) -> Path:
        """Pointer to the snapshot taken last."""
        return self.processed / "snapshots" / "current.json"

    @property
    def current_checkpoint(self) -> Path:
        """Pointer to the checkpoint that the last training ended with."""
        return self.checkpoints / "current_checkpoint.json"

    @property
    def current_evaluation(self) -> Path:
        """Pointer to the last evaluation."""
        return self.checkpoints / "current_evaluation.json"

    @property
    def released(self) -> Path:
        """Pointer to the released model of the line."""
        return self._of_the_line("released")

    @property
    def decision(self) -> Path:
        """What text the last decision about a release of the line was made on."""
        return self._of_the_line("decision")

    @property
    def models(self) -> Path:
        return self.root / "models"

    def _of_the_line(self, name: str) -> Path:
        return self.models / (f"{name}.json" if self.release_line is None else f"{name}_{self.release_line}.json")


class CatalogResource(dg.ConfigurableResource):
    """How the DuckDB catalog of a storage is opened; connections are short, so several steps can write in turn."""

    wait_seconds: float = Field(
        default=60.0, gt=0, description="Seconds that a step waits for others who have the catalog open before it fails."
    )

    def open(self, storage: Storage, at_most: float = math.inf) -> Catalog:
        """The catalog in the home that a step was given; at_most: bound of the waiting where there is no time for all of it."""
        return Catalog(storage.root / "catalog.duckdb", min(self.wait_seconds, at_most))


class Torchrun(dg.ConfigurableResource):
    """How the training processes are started, watched and stopped."""

    stop_seconds: float = Field(default=110.0, gt=0, description="Seconds a cancelled training has to save before it is killed.")
    report_seconds: float = Field(default=5.0, gt=0, description="Seconds between two progress reports while it trains.")
    catalog_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds between two records in the catalog while it trains; more where a record takes long.",
    )
