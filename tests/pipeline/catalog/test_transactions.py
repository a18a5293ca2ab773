"""Rule 35: an artifact is recorded completely or not at all."""

import resource
import signal

import pytest

from pipeline.catalog.catalog import Catalog
from tests.support.artifacts import Artifacts, contents, document_id, killed_at_random, leave_a_log, python

KILLED_WRITER = """
import sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
catalog, run_dir = Catalog(Path(sys.argv[1]), 30), Path(sys.argv[2])
print("ready", flush=True)
while True:
    catalog.record_run(run_dir)
"""


def test_rule_35_a_writer_killed_at_any_moment_leaves_a_consistent_state(artifacts: Artifacts) -> None:
    path = artifacts.home / "catalog.duckdb"
    run_dir = artifacts.home / "checkpoints" / "run"
    catalog = Catalog(path, wait_seconds=30)
    artifacts.record_all(catalog)
    expected = contents(catalog)
    for _ in killed_at_random(KILLED_WRITER, path, run_dir, seed=35, within=0.15):
        assert contents(catalog) == expected


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import Database
victim, moment = sys.argv[3], int(sys.argv[4])
calls = 0
class Killer:
    # A DuckDB connection that kills the process at one of its statements.
    def __init__(self, connection): self.connection = connection
    def __getattr__(self, name): return getattr(self.connection, name)
    def execute(self, *arguments):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.connection.execute(*arguments)
from contextlib import contextmanager
connect = Database.connect
@contextmanager
def killing(self, read_only=False):
    with connect(self, read_only) as connection:
        yield Killer(connection)
Database.connect = killing
catalog = Catalog(Path(sys.argv[1]), 30)
home = Path(sys.argv[2])
if victim == "snapshot": catalog.record_snapshot(home / "processed_data", "snap")
elif victim == "dataset": catalog.record_dataset(home / "processed_data", "data")
else: catalog.record_run(home / "checkpoints" / "run")
"""


@pytest.mark.parametrize("victim", ["snapshot", "dataset", "run"])
def test_rule_35_a_record_killed_before_any_of_its_statements_leaves_the_previous_state(
    victim: str, artifacts: Artifacts
) -> None:
    path = artifacts.home / "catalog.duckdb"
    catalog = Catalog(path, wait_seconds=30)
    catalog.create()
    empty = contents(catalog)
    for moment in range(2, 20):
        writer = python(KILLED_IN_THE_MIDDLE, path, artifacts.home, victim, moment)
        writer.communicate()
        if writer.returncode == 0:
            break
        assert writer.returncode == -signal.SIGKILL
        assert contents(catalog) == empty
    assert moment > 3, "several statements were interrupted"
    assert contents(catalog) != empty


def test_a_committed_record_survives_the_death_of_its_process(artifacts: Artifacts) -> None:
    """The rows are only in the write-ahead log; readers and the next writer see them."""
    path = artifacts.home / "catalog.duckdb"
    leave_a_log(path)
    catalog = Catalog(path)
    assert len(catalog.query("SELECT * FROM dataset_shards")) == 1
    catalog.create()
    assert len(catalog.query("SELECT * FROM dataset_shards")) == 1


def test_a_full_disk_is_reported_and_leaves_the_previous_state(catalog: Catalog, artifacts: Artifacts) -> None:
    before = contents(catalog)
    path = artifacts.home / "catalog.duckdb"
    artifacts.snapshot("large", [f"file {number} {document_id(str(number))}" for number in range(40_000)])
    program = """
import sys
from pathlib import Path
from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogError
try:
    Catalog(Path(sys.argv[1])).record_snapshot(Path(sys.argv[2]), "large")
except CatalogError as error:
    print(error)
"""
    limit = path.stat().st_size + 300_000

    def small_files() -> None:  # like a full disk, without mounting a file system
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    output, _ = python(program, path, artifacts.processed, preexec_fn=small_files).communicate()
    assert str(path) in output
    assert "if there is room on the disk" in output
    assert contents(catalog) == before
    problem = python(
        program.replace('Catalog(Path(sys.argv[1])).record_snapshot(Path(sys.argv[2]), "large")', "rebuild_home()").replace(
            "try:",
            "from pipeline.catalog.rebuild import rebuild\nrebuild_home = lambda: rebuild(*map(Path, sys.argv[2:0:-1]))\ntry:",
        ),
        path,
        artifacts.home,
        preexec_fn=small_files,
    ).communicate()[0]
    assert "catalog.duckdb.new" in problem, "the new catalog is incomplete: the old one is kept"
    assert contents(catalog) == before
