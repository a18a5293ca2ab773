"""Dagster resources: storage, the catalog, and how training is launched."""

import math
import os
import re
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
from pydantic import Field, PrivateAttr

from llm_core.corpus import InputDir, is_url
from llm_core.errors import UserError
from llm_core.layout import QUICKSTART, Home, named_folder
from llm_core.system import in_use
from pipeline.catalog.catalog import Catalog


class Storage(dg.ConfigurableResource):
    """The home, the raw text and the release line of a run."""

    home: str = Field(
        default_factory=lambda: os.environ.get("TEXTMILL_HOME", "data"), description="Root of everything textmill writes."
    )
    raw_text_dir: str | None = Field(
        default=None, description="Folder of the raw text, or its URL (s3://...); default: raw_text_data under the home."
    )
    release_line: str | None = Field(
        default=None,
        description="Name of a line of models that are compared, released and continued only among themselves, such as one per "
        "model size; default: one line for all. The quickstart has the line quickstart, with its own text and prepared data.",
    )
    _in_quickstart: bool = PrivateAttr(False)
    _in_use: ExitStack = PrivateAttr(default_factory=ExitStack)
    _used: set[Path] = PrivateAttr(default_factory=set)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        if context.run is not None:
            self.in_job(context.run.job_name)

    def in_job(self, name: str) -> None:
        """Adapts folders and line to a job: the quickstart has its own, whatever `-c` replaces of its configuration."""
        self._in_quickstart = name == QUICKSTART

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        self.stop_using()

    def use(self, folder: Path) -> None:
        """Keeps garbage collection away from a folder until the Dagster run ends: its later steps need it."""
        if folder not in self._used:
            self._in_use.enter_context(in_use(folder))
            self._used.add(folder)

    def stop_using(self) -> None:
        """Ends every `use`."""
        self._in_use.close()
        self._used.clear()

    @property
    def line(self) -> str | None:
        """The release line of the run; None for the one without a name."""
        return QUICKSTART if self._in_quickstart else self.release_line

    @property
    def folders(self) -> Home:
        """The home with every path in it.

        Raises:
            UserError: the home or the release line is not a usable name, or an option does not fit the quickstart. (Checked here
                and not by pydantic: Dagster takes an invalid resource for a crash and retries it.)
        """
        if self.release_line is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.release_line):
            raise UserError(
                f"storage.release_line {self.release_line}: not a name; use letters, digits, '.', '_' and '-', and begin with a "
                "letter or digit"
            )
        if self.line == QUICKSTART:
            other_line = None if self.release_line == QUICKSTART else self.release_line
            for name, value in (("raw_text_dir", self.raw_text_dir), ("release_line", other_line)):
                if value is not None:
                    raise UserError(
                        f"storage.{name} {value}: the quickstart has its own text and release line; leave {name} out, or launch "
                        "pretrain for your own text"
                    )
        return Home(named_folder(self.home), quickstart=self.line == QUICKSTART)

    @property
    def raw_text(self) -> InputDir:
        """The raw text: a resolved path, or a URL as it was given."""
        if self.raw_text_dir and is_url(self.raw_text_dir):
            return self.raw_text_dir
        return named_folder(self.raw_text_dir) if self.raw_text_dir else self.folders.raw_text

    @property
    def released(self) -> Path:
        """Pointer to the released model of the release line."""
        return self.folders.released(self.line)

    @property
    def decision(self) -> Path:
        """The snapshot that the newest release decision of the line was based on."""
        return self.folders.decision(self.line)


class CatalogResource(dg.ConfigurableResource):
    """How the DuckDB catalog is opened. Connections are short, so that steps can write in turn."""

    wait_seconds: float = Field(
        default=60.0, gt=0, description="Seconds a step waits for other processes that have the catalog open."
    )

    def open(self, storage: Storage, at_most: float = math.inf) -> Catalog:
        """The catalog of a home. at_most: upper bound of the waiting time."""
        return Catalog(storage.folders.catalog, min(self.wait_seconds, at_most))


class Torchrun(dg.ConfigurableResource):
    """How training processes are watched and stopped."""

    stop_seconds: float = Field(default=110.0, gt=0, description="Seconds a cancelled training has to save before it is killed.")
    report_seconds: float = Field(default=5.0, gt=0, description="Seconds between two progress reports during training.")
    catalog_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds between two records in the catalog during training; more if recording is slow.",
    )
