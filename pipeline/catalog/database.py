"""Short, serialized connections to the catalog file.

While one process has a DuckDB file open for writing, no other process can open it. textmill's processes queue with `flock` on
side files. While another program has the file open, such as the duckdb command, opening is retried within the same time limit.
If that program only reads, a writer soon stops waiting and writes to a copy that replaces the file.
"""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO

import duckdb

from llm_core.errors import DataError, TextmillError, UserError
from llm_core.system import DISK_FULL, free_bytes, is_without_locks, lock_file, no_locks
from pipeline.catalog.file_swap import beside, copy_database, is_misread, lock_out_writers, plain_copy, replacement, settle_logs

# Readable by DuckDB 1.5 and newer.
STORAGE_VERSION = "v1.5.0"

# Seconds that a writer waits for readers of other programs before it copies the file.
_PATIENCE_WITH_READERS = 2.0

_REMEDY = "rebuild it from the files on disk: textmill catalog rebuild"
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    # Do not download extensions.
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # Queries are small: starting a thread per core would take longer.
    "threads": "2",
}
# Errors of the file and the disk, not of a statement. A wrong checksum raises a plain `duckdb.Error`.
_FILE_ERRORS = (
    duckdb.IOException,
    duckdb.InternalException,
    duckdb.FatalException,
    duckdb.SerializationException,
    duckdb.TransactionException,
)


class CatalogError(DataError):
    """The catalog file is damaged or cannot be read or written."""


class CatalogBusyError(CatalogError):
    """Other processes kept the catalog open for the entire waiting time."""


class _LockedError(Exception):
    """Another program has the file open; the argument names it."""


class Database:
    """One DuckDB file, open only within `connect` blocks, which do not nest."""

    def __init__(self, path: Path, wait_seconds: float = 60.0) -> None:
        self.path = path
        self._wait_seconds = wait_seconds

    @contextmanager
    def connect(self, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises:
            UserError: there is no file to read, its schema has another version, or its file system has no locks.
            CatalogError: the file is damaged, the disk is full, or others kept the file open for the entire waiting time.
        """
        if read_only and not self.path.exists():
            raise UserError(f"{self.path}: no such catalog; run a job first, or name its folder with --home or TEXTMILL_HOME")
        with self._turn(shared=read_only) as deadline, self._opened(deadline, read_only) as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Yields the path of a new file that replaces the old one when the block ends without an error.

        Meanwhile the old file cannot be written to. Existing readers keep it.

        Raises:
            CatalogError: the new file could not be written, or another program kept the old one open for writing.
        """
        with self._turn(shared=False) as deadline, ExitStack() as held:
            if self.path.exists():  # it may be damaged: only its lock is used
                while (source := lock_out_writers(self.path)) is None:
                    self._pause(deadline, f"{self._writer()} has it open")
                held.callback(os.close, source)
            fresh = held.enter_context(replacement(self.path))
            yield fresh
            Database(fresh)._settle()

    def _settle(self) -> None:
        """Merges the write-ahead log into the file."""
        with self._turn(shared=False) as deadline, self._opened(deadline, read_only=False) as connection:
            connection.execute("CHECKPOINT")

    @contextmanager
    def _opened(self, deadline: float, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection to the file, or, if readers of other programs block a writer, to a copy that replaces it at the end."""
        settle_logs(self.path)  # left aside by a killed process
        path, copy_after = self.path, time.monotonic() + min(_PATIENCE_WITH_READERS, self._wait_seconds / 2)
        with self._file_errors(), ExitStack() as held:
            if is_misread(path):
                path = held.enter_context(plain_copy(path, read_only))
            while True:
                try:
                    connection = self._attach(path, read_only)
                    break
                except _LockedError as locked:
                    reason = f"{locked} has it open"
                may_copy = not read_only and path == self.path and time.monotonic() >= copy_after
                if may_copy and (source := lock_out_writers(path)) is not None:
                    # Closed only after the copy has replaced the file: until then no writer gets the lock of the old file.
                    held.callback(os.close, source)
                    path = held.enter_context(replacement(self.path))
                    try:
                        copy_database(source, self.path, path)
                    except OSError as error:
                        raise self._refused(error, "other programs read it, and it cannot be copied", "close it there") from None
                else:
                    self._pause(deadline, reason)
            held.callback(connection.close)  # rolls back an open transaction
            yield connection
            if path != self.path and not read_only:
                connection.execute("CHECKPOINT")  # the log is not moved with the file

    @contextmanager
    def _turn(self, shared: bool) -> Iterator[float]:
        """Waits until this process may open the file, with other readers or as the only writer; yields the deadline for waiting.

        Only the first process in the queue waits for the lock: otherwise overlapping readers could block a writer forever.
        """
        deadline = time.monotonic() + self._wait_seconds
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            queue, lock = (open(beside(self.path, suffix), "a+", encoding="utf-8") for suffix in (".queue", ".lock"))
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot create the catalog's lock in this folder ({error.strerror})") from None
        with lock:
            with queue:  # closing it lets the next process in the queue wait for the lock
                for file, is_shared in ((queue, False), (lock, shared)):
                    while True:
                        try:
                            lock_file(file.fileno(), self.path, is_shared)
                            break
                        except BlockingIOError:
                            self._pause(deadline, f"process {_holder(lock)} holds {lock.name}")
            if not shared:
                lock.truncate(0)  # a killed process leaves its id
                lock.write(str(os.getpid()))
                lock.flush()
            try:
                yield deadline
            finally:
                if not shared:
                    lock.truncate(0)

    def _attach(self, path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
        """Raises _LockedError if another program has the file open."""
        connection = duckdb.connect(":memory:", config=_SETTINGS)
        try:
            options = "READ_ONLY" if read_only else f"STORAGE_VERSION '{STORAGE_VERSION}'"
            # ATTACH does not bind parameters: quotes in the path are doubled. A relative path could begin like a URL.
            quoted = str(path.resolve()).replace("'", "''")
            connection.execute(f"ATTACH '{quoted}' AS catalog ({options})")
            connection.execute("USE catalog")
            if not read_only:
                migrate(connection)
            _check_version(connection, self.path)
            return connection
        except duckdb.Error as error:
            connection.close()
            if "Could not set lock on file" not in str(error):
                raise self._refused(error, "damaged or not readable", _REMEDY) from None
            if is_without_locks(str(error)):
                raise no_locks(path, "DuckDB needs them") from None
            holder = re.search(r"held in (.*?\(PID \d+\))", str(error))
            raise _LockedError(holder[1] if holder else "another program") from None
        except BaseException:
            connection.close()
            raise

    def _writer(self) -> str:
        """The process that has the file open for writing; DuckDB names it in the error of a reader."""
        try:
            self._attach(self.path, read_only=True).close()
        except (_LockedError, TextmillError) as error:
            return str(error) if isinstance(error, _LockedError) else "another program"
        return "another program"

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        """Turns DuckDB's errors of the file and the disk into CatalogError."""
        try:
            yield
        except duckdb.Error as error:
            if type(error) is duckdb.Error or isinstance(error, _FILE_ERRORS):
                raise self._refused(error, "not readable or writable", f"if there is room on the disk, {_REMEDY}") from None
            raise

    def _refused(self, error: Exception, problem: str, remedy: str) -> CatalogError:
        if any(os.strerror(number) in str(error) for number in DISK_FULL):
            problem = f"disk full, it needs more than the {free_bytes(self.path):,} bytes that are free"
            remedy = "existing records are unchanged. Free some space and run again"
        return CatalogError(f"{self.path}: {problem} ({error}); {remedy}")

    def _pause(self, deadline: float, reason: str) -> None:
        if time.monotonic() >= deadline:
            raise CatalogBusyError(f"{self.path}: busy for {self._wait_seconds:g} seconds: {reason}; close it and run again")
        time.sleep(random.uniform(0.005, 0.05))


def migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """Migrates the file to the newest schema version, each version in its own transaction."""
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY)")
    present = _version(connection)
    for version, statements in schema_versions():
        if version > present:
            connection.execute("BEGIN")
            connection.execute(statements)
            connection.execute("INSERT INTO schema_version VALUES (?)", [version])
            connection.execute("COMMIT")


def schema_versions() -> list[tuple[int, str]]:
    """The sections of schema.sql: version and statements, in order."""
    text = files("pipeline.catalog").joinpath("schema.sql").read_text(encoding="utf-8")
    sections = re.split(r"^-- version (\d+)$", text, flags=re.MULTILINE)
    return [(int(version), statements) for version, statements in zip(sections[1::2], sections[2::2], strict=True)]


def _version(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    assert row is not None
    return int(row[0])


def _check_version(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    present, newest = _version(connection), schema_versions()[-1][0]
    if present > newest:
        raise UserError(f"{path}: has schema version {present}, this textmill supports {newest}; use a newer textmill")
    if present < newest:  # a reader: writers have migrated it
        raise UserError(f"{path}: has the older schema version {present}; migrate it to {newest}: textmill catalog rebuild")


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "unknown"
