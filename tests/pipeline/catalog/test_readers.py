"""Rule 36: another program that reads the catalog never makes a writer fail."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from pipeline.catalog.catalog import Catalog
from pipeline.catalog.database import CatalogBusyError, CatalogError, Database
from pipeline.catalog.rebuild import rebuild
from tests.support.artifacts import Artifacts, contents, killed_at_random, leave_a_log, python_ready

# Opens the file named on its standard input and keeps it open; an empty line prints the rows it sees again.
READER = """
import sys, duckdb
connection = None
print("ready", flush=True)
for line in sys.stdin:
    if line.strip():
        if connection is not None:
            connection.close()
        connection = duckdb.connect(line.strip(), read_only=True)
    print(*(row[0] for row in connection.execute("SELECT shard_id FROM dataset_shards ORDER BY 1").fetchall()), flush=True)
"""


class Reader:
    """Another process that reads a catalog and keeps it open."""

    def __init__(self) -> None:
        self.process = python_ready(READER)

    def open(self, path: Path) -> list[str]:
        return self._ask(str(path))

    def rows(self) -> list[str]:
        return self._ask("")

    def _ask(self, line: str) -> list[str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().split()


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.process.kill()
    reader.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.duckdb"
    write(path, "first")
    return path


def write(path: Path, row: str, wait_seconds: float = 30) -> None:
    with Database(path, wait_seconds).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES ('d', ?, 0, 0)", [row])


def rows(path: Path) -> list[str]:
    return [row["shard_id"] for row in Catalog(path).query("SELECT shard_id FROM dataset_shards ORDER BY 1")]


def beside(path: Path) -> set[str]:
    return {other.name.removeprefix(path.name) for other in path.parent.glob(f"{path.name}*")}


def test_rule_36_a_foreign_reader_never_makes_a_writer_fail(path: Path, reader: Reader) -> None:
    assert reader.open(path) == ["first"]
    before = path.stat().st_ino
    write(path, "second", wait_seconds=4)
    write(path, "third", wait_seconds=4)
    assert reader.rows() == ["first"], "it still reads the file it opened"
    assert reader.open(path) == ["first", "second", "third"], "a new connection sees the new rows"
    assert rows(path) == ["first", "second", "third"]
    assert path.stat().st_ino != before
    assert beside(path) == {"", ".lock", ".queue"}


def test_a_writer_waits_for_a_reader_that_closes_soon_and_copies_nothing(path: Path, reader: Reader, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.catalog.database._PATIENCE_WITH_READERS", 60.0)
    reader.open(path)
    before = path.stat().st_ino
    subprocess.Popen(["sh", "-c", f"sleep 1; kill {reader.process.pid}"])
    write(path, "second", wait_seconds=200)
    assert path.stat().st_ino == before


def test_the_log_of_a_killed_writer_is_in_the_copy_and_next_to_no_other_file(path: Path, reader: Reader) -> None:
    leave_a_log(path)
    assert reader.open(path) == ["first", "s"]
    write(path, "third")
    assert beside(path) == {"", ".lock", ".queue"}
    assert reader.rows() == ["first", "s"]
    assert rows(path) == reader.open(path) == ["first", "s", "third"]


def test_a_failed_record_leaves_the_file_and_its_log_unchanged(path: Path, reader: Reader) -> None:
    leave_a_log(path)
    reader.open(path)
    before = path.read_bytes(), path.with_name("catalog.duckdb.wal").read_bytes()
    with pytest.raises(duckdb.ConstraintException), Database(path, 4).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES ('d', 'half', 0, 0), ('d', 'half', 0, 0)")
    assert (path.read_bytes(), path.with_name("catalog.duckdb.wal").read_bytes()) == before
    assert beside(path) == {"", ".wal", ".lock", ".queue"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_or_quota_without_space_for_the_copy_is_reported(
    number: int, path: Path, reader: Reader, monkeypatch: Any
) -> None:
    reader.open(path)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as disk:
        disk.setattr(shutil, "copyfileobj", full)
        with pytest.raises(CatalogError, match="disk full"):
            write(path, "second", wait_seconds=1)
    write(path, "second", wait_seconds=1)
    assert rows(path) == ["first", "second"]


def test_foreign_writers_are_locked_out_while_the_copy_is_written(path: Path, reader: Reader) -> None:
    """It would write to the file that is about to be replaced."""
    reader.open(path)
    program = "import sys, duckdb; duckdb.connect(sys.argv[1]).execute('CREATE TABLE lost (row INTEGER)')"
    with Database(path, 4).connect() as connection:
        connection.execute("INSERT INTO dataset_shards VALUES ('d', 'second', 0, 0)")
        reader.process.kill()
        reader.process.communicate()
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "Could not set lock on file" in done.stderr
    assert rows(path) == ["first", "second"]


def test_rebuild_replaces_the_file_that_a_foreign_reader_has_open(
    catalog: Catalog, artifacts: Artifacts, reader: Reader, monkeypatch: Any
) -> None:
    path = artifacts.home / "catalog.duckdb"
    before = contents(catalog)
    seen = reader.open(path)
    write(path, "extra")
    monkeypatch.setattr("pipeline.catalog.rebuild.Database", lambda path: Database(path, wait_seconds=4))
    reader.open(path)
    assert rebuild(artifacts.home, path) == []
    assert reader.rows() == sorted([*seen, "extra"])
    assert reader.open(path) == seen
    assert contents(catalog) == before


# Forks a writer for each number on its standard input; it kills itself at that line of the code that replaces the file.
KILLED_AT_A_LINE = """
import os, signal, sys
from pathlib import Path
from pipeline.catalog import database, file_swap
database._PATIENCE_WITH_READERS = 0.0
print("ready", flush=True)
for line in sys.stdin:
    number, path = line.split()
    child = os.fork()
    if child == 0:
        lines_left = int(number)
        def trace(frame, event, _):
            global lines_left
            if frame.f_code.co_filename != file_swap.__file__ or frame.f_code.co_name == "beside":
                return None
            lines_left -= event == "line"
            if not lines_left:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        with database.Database(Path(path), 30).connect() as connection:
            connection.execute("INSERT INTO dataset_shards VALUES ('d', 'third', 0, 0)")
        sys.settrace(None)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_a_line_of_the_replacement_loses_nothing(
    tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.catalog.database._PATIENCE_WITH_READERS", 0.0)
    start = tmp_path / "start"
    write(start / "catalog.duckdb", "first")
    leave_a_log(start / "catalog.duckdb")
    victims = python_ready(KILLED_AT_A_LINE)
    assert victims.stdin is not None and victims.stdout is not None
    found = []
    for number in range(1, 1000, 3):  # a third of the lines: half a minute
        path = tmp_path / str(number) / "catalog.duckdb"
        shutil.copytree(start, path.parent)
        reader.open(path)
        victims.stdin.write(f"{number} {path}\n")
        victims.stdin.flush()
        code = int(victims.stdout.readline())
        found.append(len(rows(path)))
        assert rows(path) in (["first", "s"], ["first", "s", "third"]), f"killed at line {number}"
        assert reader.rows() == ["first", "s"]
        write(path, "zzz")
        assert rows(path)[-1] == "zzz"
        assert beside(path) == {"", ".lock", ".queue"}, f"killed at line {number}"
        shutil.rmtree(path.parent)
        if code == 0:
            break
        assert code == -9
    assert number > 30 and found == sorted(found) and found[0] == 2 and found[-1] == 3
    victims.communicate()


# Keeps reopening the file for reading, so that a writer rarely finds it closed.
CROWD = """
import sys, time, duckdb
print("ready", flush=True)
while True:
    try:
        with duckdb.connect(sys.argv[1], read_only=True):
            time.sleep(0.1)
    except duckdb.Error:
        pass
"""
NUMBERING_WRITER = """
import sys
from pathlib import Path
from llm_core.system import atomic_writer
from pipeline.catalog import database
database._PATIENCE_WITH_READERS = 0.02
path, committed = map(Path, sys.argv[1:])
print("ready", flush=True)
while True:
    with database.Database(path, 60).connect() as connection:
        (number,) = connection.execute("SELECT count(*) FROM dataset_shards").fetchone()
        connection.execute("INSERT INTO dataset_shards VALUES ('d', ?, 0, 0)", [f"{number:05}"])
    with atomic_writer(committed) as file:
        file.write(str(number).encode())
"""


def test_writers_killed_at_random_among_foreign_readers_lose_nothing(tmp_path: Path) -> None:
    path, committed = tmp_path / "catalog.duckdb", tmp_path / "committed"
    Catalog(path).create()
    committed.write_text("-1")
    crowd = [python_ready(CROWD, path) for _ in range(3)]
    inodes = set()
    try:
        for _ in killed_at_random(NUMBERING_WRITER, path, committed, seed=36, within=1.5):
            found = rows(path)
            inodes.add(path.stat().st_ino)
            assert found == [f"{number:05}" for number in range(len(found))]
            assert int(committed.read_text()) in (len(found) - 1, len(found) - 2), "committed rows are kept"
        assert len(inodes) > 1, "copies replaced the file"
        assert [process.poll() for process in crowd] == [None] * len(crowd)
    finally:
        for process in crowd:
            process.kill()
            process.communicate()


def test_a_writer_waits_for_a_foreign_writer_and_names_it(path: Path, shell: Callable[..., Any]) -> None:
    shell(path)
    with pytest.raises(CatalogBusyError, match=r"busy for 1 seconds: .*duckdb \(PID \d+\) has it open; close it and run again"):
        write(path, "second", wait_seconds=1)
    with pytest.raises(CatalogBusyError, match=r"duckdb \(PID \d+\) has it open"), Database(path, 1).replaced():
        pytest.fail("it yields no path")
    with pytest.raises(duckdb.IOException):
        duckdb.connect(str(path), read_only=True)
