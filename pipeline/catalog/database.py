"""Short, serialized connections to the catalog file.

DuckDB lets one process open a file for writing, and then nobody else at all. Side files with a `flock` make our own processes
wait for each other in turn; against foreign ones, such as the duckdb command, opening is retried within the same bound. For those
that only read nobody waits to the end: what is written then goes into a copy, which takes the file's place.
"""

import fcntl
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
from llm_core.files import DISK_FULL, free_bytes
from pipeline.catalog.replacement import beside, copy_database, lock_out_writers, replacement, settle_logs

STORAGE_VERSION = "v1.5.0"
"""Written so that DuckDB clients from 1.5 on can read the file."""

_PATIENCE_WITH_READERS = 2.0
"""Seconds that a writer gives foreign readers to go before it takes a copy."""

_REMEDY = "make it again from the files on disk with: textmill catalog rebuild"
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    # An extension that is not built in would be fetched from the network.
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # The work is small: a thread for each of many cores would cost more than it gives.
    "threads": "2",
}
# What DuckDB raises about the file and the disk, not about a statement. A wrong checksum comes as a bare `duckdb.Error`.
_FILE_ERRORS = (
    duckdb.IOException,
    duckdb.InternalException,
    duckdb.FatalException,
    duckdb.SerializationException,
    duckdb.TransactionException,
)


class CatalogError(DataError):
    """The catalog's own file is damaged, or the disk refuses it."""


class CatalogBusyError(CatalogError):
    """Others held the catalog for the whole waiting time."""


class _LockedError(Exception):
    """Another program has the file open; the argument names it."""


class Database:
    """One DuckDB file. Nothing is held open between two `connect` blocks; they do not nest."""

    def __init__(self, path: Path, wait_seconds: float = 60.0) -> None:
        self.path = path
        self._wait_seconds = wait_seconds

    @contextmanager
    def connect(self, read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises:
            UserError: there is no file to read, or its schema is not this program's.
            CatalogError: the file is damaged, the disk is full, or others held the file for the whole waiting time.
        """
        if read_only and not self.path.exists():
            raise UserError(f"{self.path}: no such catalog; run a job first, or name its folder with --home or TEXTMILL_HOME")
        with self._turn(shared=read_only) as deadline, self._opened(deadline, read_only) as connection:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def replaced(self) -> Iterator[Path]:
        """Gives the path for a new file, which takes the old one's place when the block ends without an error.

        Whoever reads the old one reads on in it; nobody can write to it meanwhile.

        Raises:
            CatalogError: the new file could not be written whole, or others kept the old one open for writing.
        """
        with self._turn(shared=False) as deadline, ExitStack() as held:
            if self.path.exists():  # no more is asked of it than its lock: it may be damaged
                while (source := lock_out_writers(self.path)) is None:
                    self._pause(deadline, f"{self._writer()} has it open")
                held.callback(os.close, source)
            fresh = held.enter_context(replacement(self.path))
            yield fresh
            Database(fresh)._settle()

    def _settle(self) -> None:
        """Takes the write-ahead log into the file."""
        with self._turn(shared=False) as deadline, self._opened(deadline, read_only=False) as connection:
            connection.execute("CHECKPOINT")

    @contextmanager
    def _opened(self, deadline: float, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection to the file; where foreign readers keep it from a writer, to a copy that takes its place in the end."""
        settle_logs(self.path)  # which a killed process may have set aside
        path, patient_until = self.path, time.monotonic() + min(_PATIENCE_WITH_READERS, self._wait_seconds / 2)
        with self._file_errors(), ExitStack() as held:
            while True:
                try:
                    connection = self._attach(path, read_only)
                    break
                except _LockedError as locked:
                    reason = f"{locked} has it open"
                copies = not read_only and path == self.path and time.monotonic() >= patient_until
                if copies and (source := lock_out_writers(path)) is not None:
                    # Closed only when the copy has its place and the disk knows it: a writer that opened the old file just
                    # before is still refused the lock.
                    held.callback(os.close, source)
                    path = held.enter_context(replacement(self.path))
                    try:
                        copy_database(source, self.path, path)
                    except OSError as error:
                        raise self._refused(error, "others read it, and it cannot be copied", "close it there") from None
                else:
                    self._pause(deadline, reason)
            held.callback(connection.close)  # which rolls back what was not committed
            yield connection
            if path != self.path:
                connection.execute("CHECKPOINT")  # its log would not go with it

    @contextmanager
    def _turn(self, shared: bool) -> Iterator[float]:
        """Waits for our other processes, readers together or one writer alone, and gives the deadline of all waiting.

        Only one process at a time waits for those inside, all others wait behind it: otherwise readers that overlap would
        keep a writer out for as long as they come.
        """
        deadline = time.monotonic() + self._wait_seconds
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            queue, lock = (open(beside(self.path, suffix), "a+", encoding="utf-8") for suffix in (".queue", ".lock"))
        except OSError as error:
            raise UserError(f"{self.path.parent}: not a folder to keep the catalog's lock in ({error.strerror})") from None
        with queue, lock:
            for file, kind in ((queue, fcntl.LOCK_EX), (lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)):
                while True:
                    try:
                        fcntl.flock(file, kind | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        self._pause(deadline, f"process {_holder(lock)} holds {lock.name}")
            fcntl.flock(queue, fcntl.LOCK_UN)
            if not shared:
                lock.truncate(0)  # a killed process leaves its number
                lock.write(str(os.getpid()))
                lock.flush()
            try:
                yield deadline
            finally:
                if not shared:
                    lock.truncate(0)

    def _attach(self, path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
        """Raises _LockedError where another program's lock is in the way."""
        connection = duckdb.connect(":memory:", config=_SETTINGS)
        try:
            options = "READ_ONLY" if read_only else f"STORAGE_VERSION '{STORAGE_VERSION}'"
            # ATTACH takes no bound parameter for its file; a quote in the path is doubled.
            quoted = str(path).replace("'", "''")
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
            holder = re.search(r"held in (.*?\(PID \d+\))", str(error))
            raise _LockedError(holder[1] if holder else "another program") from None
        except BaseException:
            connection.close()
            raise

    def _writer(self) -> str:
        """Who has the file open for writing: DuckDB knows, and tells whoever wants to read it."""
        try:
            self._attach(self.path, read_only=True).close()
        except (_LockedError, TextmillError) as error:
            return str(error) if isinstance(error, _LockedError) else "another program"
        return "another program"

    @contextmanager
    def _file_errors(self) -> Iterator[None]:
        """Makes an error of ours of what DuckDB says about the file and the disk."""
        try:
            yield
        except duckdb.Error as error:
            if type(error) is duckdb.Error or isinstance(error, _FILE_ERRORS):
                raise self._refused(error, "not readable or writable", f"if there is room on the disk, {_REMEDY}") from None
            raise

    def _refused(self, error: Exception, problem: str, remedy: str) -> CatalogError:
        if any(os.strerror(number) in str(error) for number in DISK_FULL):
            problem = f"disk full, it needs more than the {free_bytes(self.path):,} bytes that are free"
            remedy = "what was recorded before is untouched. Free some space and run again"
        return CatalogError(f"{self.path}: {problem} ({error}); {remedy}")

    def _pause(self, deadline: float, reason: str) -> None:
        if time.monotonic() >= deadline:
            raise CatalogBusyError(f"{self.path}: busy for {self._wait_seconds:g} seconds: {reason}; close it and run again")
        time.sleep(random.uniform(0.005, 0.05))


def migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """Brings the file to the newest schema version, each missing version in a transaction of its own."""
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
    parts = re.split(r"^-- version (\d+)$", text, flags=re.MULTILINE)
    return [(int(version), statements) for version, statements in zip(parts[1::2], parts[2::2], strict=True)]


def _version(connection: duckdb.DuckDBPyConnection) -> int:
    row = connection.execute("SELECT coalesce(max(version), 0) FROM schema_version").fetchone()
    assert row is not None
    return int(row[0])


def _check_version(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    present, known = _version(connection), schema_versions()[-1][0]
    if present > known:
        raise UserError(f"{path}: has schema version {present}, this textmill knows {known}; use a newer textmill")
    if present < known:  # only a reader meets this
        raise UserError(f"{path}: has the older schema version {present}; bring it to {known}: textmill catalog rebuild")


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "unknown"
