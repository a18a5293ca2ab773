"""A catalog with a whole lineage in it."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.catalog.catalog import Catalog
from tests.pipeline.catalog.artifacts import NASTY, Artifacts, duckdb_command


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    made = Artifacts(tmp_path / "home")
    made.whole_lineage(NASTY)
    return made


@pytest.fixture
def catalog(artifacts: Artifacts) -> Catalog:
    """A catalog with the whole lineage in it."""
    catalog = Catalog(artifacts.home / "catalog.duckdb", wait_seconds=30)
    artifacts.record_all(catalog)
    return catalog


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the duckdb command on a file and leaves it open there."""
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
