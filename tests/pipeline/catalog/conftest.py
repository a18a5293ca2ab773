"""A catalog of a small lineage, and the duckdb command."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.catalog.catalog import Catalog
from tests.support.artifacts import NASTY, Artifacts, duckdb_command


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    artifacts = Artifacts(tmp_path / "home")
    artifacts.full_lineage(NASTY)
    return artifacts


@pytest.fixture
def catalog(artifacts: Artifacts) -> Catalog:
    """A catalog with every artifact of the lineage."""
    catalog = Catalog(artifacts.home / "catalog.duckdb", wait_seconds=30)
    artifacts.record_all(catalog)
    return catalog


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Opens a file with the duckdb command and keeps it open."""
    started = []

    def start(path: Path, *options: str) -> "subprocess.Popen[str]":
        command = [duckdb_command(), *options, "-csv", "-noheader", str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("SELECT 'open';\n")
        process.stdin.flush()
        assert "open" in process.stdout.readline()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
