"""Short, serialized connections to the catalog file.

DuckDB lets one process open a file for writing, and then nobody else at all. A side file with a `flock` makes our own processes
wait for each other in turn; against foreign ones, such as the duckdb command, opening is retried within the same bound.
"""

import fcntl
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO

import duckdb

from llm_core.errors import DataError, UserError

STORAGE_VERSION = "v1.5.0"
"""Written so that DuckDB clients from 1.5 on can read the file."""

_REMEDY = "make it again from the files on disk with: textmill catalog rebuild"


class Database:
    """One DuckDB file. Nothing is held open between two `connect` blocks."""

    def __init__(self, path: Path, wait_seconds: float = 60.0) -> None:
        self.path = path
        self._wait_seconds = wait_seconds

    @contextmanager
    def connect(self, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises:
            UserError: there is no file to read.
            DataError: the file is damaged, or others held it for the whole waiting time.
        """
        if read_only and not self.path.exists():
            raise UserError(f"{self.path}: no such catalog; run a job first, or name its folder with --home or TEXTMILL_HOME")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self._wait_seconds
        with self._turn(deadline, shared=read_only):
            connection = self._open(deadline, read_only)
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()  # rolls back what was not committed

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps our other processes away from the file, to replace it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._turn(time.monotonic() + self._wait_seconds, shared=False):
            yield

    @contextmanager
    def _turn(self, deadline: float, shared: bool) -> Iterator[None]:
        side_file = self.path.with_name(self.path.name + ".lock")
        with open(side_file, "a+", encoding="utf-8") as lock:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            while True:
                try:
                    fcntl.flock(lock, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self._pause(deadline, f"process {_holder(lock)} holds {side_file}")
            if not shared:
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
            yield

    def _open(self, deadline: float, read_only: bool) -> duckdb.DuckDBPyConnection:
        # An extension that is not built in would be fetched from the network.
        settings = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        while True:
            connection = duckdb.connect(":memory:", config=settings)
            try:
                options = "READ_ONLY" if read_only else f"STORAGE_VERSION '{STORAGE_VERSION}'"
                # ATTACH takes no bound parameter for its file; a quote in the path is doubled.
                quoted = str(self.path).replace("'", "''")
                connection.execute(f"ATTACH '{quoted}' AS catalog ({options})")
                connection.execute("USE catalog")
                if not read_only:
                    migrate(connection)
                return connection
            except duckdb.IOException as error:
                connection.close()
                if "lock" not in str(error):
                    raise DataError(f"{self.path}: not readable ({error}); {_REMEDY}") from None
                self._pause(deadline, "another program has it open")
            except duckdb.Error as error:
                connection.close()
                raise DataError(f"{self.path}: damaged ({error}); {_REMEDY}") from None

    def _pause(self, deadline: float, reason: str) -> None:
        if time.monotonic() >= deadline:
            raise DataError(f"{self.path}: busy for {self._wait_seconds:.0f} seconds: {reason}; close it and run again")
        time.sleep(random.uniform(0.01, 0.1))


def migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """Brings the file to the newest schema version, each missing version in a transaction of its own."""
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY)")
    row = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    assert row is not None
    for version, statements in schema_versions():
        if version > row[0]:
            connection.execute("BEGIN")
            connection.execute(statements)
            connection.execute("INSERT INTO schema_version VALUES (?)", [version])
            connection.execute("COMMIT")


def schema_versions() -> list[tuple[int, str]]:
    """The sections of schema.sql: version and statements, in order."""
    text = files("pipeline.catalog").joinpath("schema.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- version (\d+)$", text, flags=re.MULTILINE)
    return [(int(version), statements) for version, statements in zip(parts[1::2], parts[2::2], strict=True)]


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "unknown"
