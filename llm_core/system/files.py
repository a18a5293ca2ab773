"""Atomic writes, sealed JSON, digests, content ids, and Arrow tables.

A write is always: temporary name in the same folder, write, flush, fsync, rename, fsync of the folder. A reader sees the old file
or the new one, never a partial one.
"""

import datetime
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError

from llm_core.errors import DataError

if TYPE_CHECKING:  # PyArrow takes 0.3 seconds to load: it is imported where it is used
    import pyarrow as pa

# Hex digits of an artifact id: 64 bits of SHA-256 suffice for billions of artifacts.
ID_LENGTH = 16

# The key of a JSON file's own digest: a flipped bit can leave valid JSON.
SEAL = "sha256_of_the_rest"

# No space left on the disk or in the quota.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# The file system does not have the operation, as with some network mounts.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class HashingWriter:
    """A binary file object that hashes and counts the bytes written."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        self._raw = raw
        self._path = path
        self._hash = hashlib.sha256()
        self.bytes_written = 0
        self.error: Exception | None = None  # of a failed write, which a caller such as PyTorch may hide

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.bytes_written += memoryview(data).nbytes
        try:
            with explain_disk_full(self._path, self.bytes_written):
                return self._raw.write(data)
        except Exception as error:
            self.error = error
            raise

    def flush(self) -> None:
        with explain_disk_full(self._path, self.bytes_written):
            self._raw.flush()

    def sha256(self) -> str:
        return self._hash.hexdigest()


def fsync_path(path: Path) -> None:
    """Makes the content of a file, or a rename in a folder if its file system can, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free


@contextmanager
def explain_disk_full(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space left" into a DataError with a remedy. needed: bytes of the file at `path` so far, pending ones included."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DataError(
            f"{path}: disk full, it needs at least {needed:,} bytes and {free_bytes(path):,} are free; "
            "existing files are untouched. Free some space and run again"
        ) from None


@contextmanager
def atomic_writer(path: Path) -> Iterator[HashingWriter]:
    """Opens a file that takes its name when the block ends without an error.

    Raises:
        DataError: the disk is full; an existing file at `path` is untouched.
        OSError: a write failed for another reason; the same holds.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explain_disk_full(path, 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as raw:
                yield HashingWriter(raw, path)
                raw.flush()
                os.fsync(raw.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def write_json(path: Path, value: Mapping[str, Any], sealed: bool = True) -> str:
    """Writes a JSON object atomically, sorted and indented, and returns the file's SHA-256.

    A sealed object contains its own digest, which `read_json` checks. Formats that other programs define are not sealed.
    """
    seal = {SEAL: _seal(json.loads(json.dumps(value)))} if sealed else {}
    with atomic_writer(path) as file:
        file.write((json.dumps(dict(value) | seal, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
        return file.sha256()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that `write_json` sealed; the seal is removed.

    Raises:
        DataError: the file is missing, not a JSON object, or changed since it was written; the message names it.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); restore it or delete it to rebuild") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    if value.pop(SEAL, None) != _seal(value):
        raise DataError(
            f"{path}: damaged or edited manually, it does not match its own digest; restore it or delete it to rebuild"
        )
    return value


Record = TypeVar("Record", bound=BaseModel)


def read_record(path: Path, record: type[Record]) -> Record:
    """Reads a sealed JSON object into a record class.

    Raises:
        DataError: the file is missing, damaged, or a field is missing or wrong; the message names file and field.
    """
    return parse_record(path, read_json(path), record)


def parse_record(path: Path, value: Mapping[str, Any], record: type[Record]) -> Record:
    """`read_record` for a value already read from `path`."""
    try:
        return record.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise DataError(f"{path}: damaged, field {field}: {problem['msg']}") from None


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _inner(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} does not name a file inside its folder")
    return name


# A relative path that cannot escape the manifest's folder.
InnerPath = Annotated[str, AfterValidator(_inner)]


def inside(folder: Path, name: str) -> Path:
    """The path of a name that a file in `folder` contains.

    Raises:
        DataError: the path would leave the folder.
    """
    try:
        return folder / _inner(name)
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder}: a file in it refers to a path outside: {error}; restore it or delete it") from None


def read_pointer(pointer: Path) -> Path:
    """The file or folder that a pointer file names, relative to the pointer's folder."""
    return inside(pointer.parent, read_json(pointer)["path"])


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, sha256: str) -> None:
    """Checks a file against the digest in its manifest.

    Raises:
        DataError: the file is missing or its bytes differ.
    """
    if not path.is_file():
        raise DataError(f"{path}: the manifest names this file, but it is missing")
    actual = sha256_file(path)
    if actual != sha256:
        raise DataError(f"{path}: damaged (SHA-256 {actual[:12]}..., the manifest has {sha256[:12]}...)")


def content_id(*parts: Any) -> str:
    """Id of an artifact: a hash of everything that determines it. parts: JSON-serializable."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:ID_LENGTH]


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: undecodable bytes of a file name or an argument are lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def parquet_bytes(table: "pa.Table", **options: Any) -> bytes:
    """A table as a Parquet file, with the options of `pq.write_table`; the same table gives the same bytes.

    Bytes first, so that they can be hashed before they are published.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return bytes(sink.getvalue().to_pybytes())


def read_parquet(path: Path, **options: Any) -> "pa.Table":
    """One Parquet file as a table, with the options of `pq.ParquetFile`.

    `pq.read_table` would read columns from folder names, and load pandas if it is installed, which takes a second.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path.absolute(), **options) as file:  # a relative path could begin like a URL
        return file.read()


def iter_rows(table: "pa.Table", *columns: str) -> Iterator[tuple[Any, ...]]:
    """Values of these columns, row by row, converted to Python objects in small batches."""
    for batch in table.select(columns).to_batches(max_chunksize=4096):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
