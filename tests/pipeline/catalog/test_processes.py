"""Rule 36: many processes use one catalog concurrently."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogBusyError, Database
from tests.support.artifacts import TABLES, duckdb_command, python, python_ready

WRITER = """
import sys
from pathlib import Path
from pipeline.catalog.database import Database
for number in range(int(sys.argv[3])):
    with Database(Path(sys.argv[1]), 60).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES (?, ?, 0, 0)", [sys.argv[2], str(number)])
"""
READER = """
import sys, time
from pathlib import Path
from pipeline.catalog.catalog import Catalog
catalog, last, reads = Catalog(Path(sys.argv[1]), 60), 0, 0
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    (row,) = catalog.query("SELECT count(*) AS n FROM dataset_shards")
    assert row["n"] >= last, "committed rows do not vanish"
    last, reads = row["n"], reads + 1
print(reads, flush=True)
"""


def test_rule_36_concurrent_writers_all_succeed_despite_readers(tmp_path: Path) -> None:
    path, end = tmp_path / "catalog.duckdb", tmp_path / "end"
    Catalog(path).create()
    readers = [python_ready(READER, path, end) for _ in range(4)]
    writers = [python(WRITER, path, number, 8) for number in range(4)]
    for writer in writers:
        writer.communicate()
    end.touch()
    reads = [int(reader.communicate()[0]) for reader in readers]
    assert [process.returncode for process in (*writers, *readers)] == [0] * 8, "no process waits for a minute"
    assert Catalog(path).query("SELECT count(*) AS n FROM dataset_shards") == [{"n": 32}]
    assert min(reads) > 0


def test_processes_that_create_the_catalog_concurrently_create_one(tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    writers = [python(WRITER, path, number, 1) for number in range(4)]
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0] * 4
    assert Catalog(path).query("SELECT count(*) AS n FROM dataset_shards") == [{"n": 4}]


HOLDER = """
import sys
from pathlib import Path
from pipeline.catalog.database import Database
with Database(Path(sys.argv[1])).connect() as connection:
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("read_only", [False, True])
def test_waiting_times_out_and_names_the_process_that_holds_the_catalog(read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "catalog.duckdb"
    holder = python_ready(HOLDER, path)
    busy = f"busy for 1 seconds: process {holder.pid} holds"
    with pytest.raises(CatalogBusyError, match=busy) as caught, Database(path, wait_seconds=1).connect(read_only):
        pass
    assert str(path) in str(caught.value)
    holder.communicate()
    Catalog(path, wait_seconds=1).create()


def test_a_writer_waits_for_a_writable_duckdb_command_and_names_it(shell: Any, catalog: Catalog) -> None:
    path = catalog._database.path
    process = shell(path)
    with pytest.raises(CatalogBusyError, match=r"duckdb \(PID \d+\) has it open; close it and run again"):
        Catalog(path, wait_seconds=1).create()
    writer = python(WRITER, path, "late", 1)
    time.sleep(1)
    assert writer.poll() is None, "it waits"
    process.communicate()
    writer.communicate()
    assert writer.returncode == 0


def test_an_older_duckdb_command_reads_the_file(catalog: Catalog) -> None:
    command = [duckdb_command(), "-readonly", "-csv", "-noheader", str(catalog._database.path)]
    for table in TABLES:
        found = subprocess.run([*command, f"SELECT count(*) FROM {table}"], capture_output=True, text=True, check=True).stdout
        assert int(found) == len(catalog.query(f"SELECT * FROM {table}"))
