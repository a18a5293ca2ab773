"""Files that appear whole or not at all, and ids made from content.

The order is always: temporary name in the same folder, write, flush, fsync, rename, fsync of the folder.
A reader therefore sees the old file or the new one, never a part.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

from pydantic import AfterValidator

from llm_core.errors import DataError

ID_LENGTH = 16
"""Hex digits of an artifact id: 64 bits of a SHA-256, enough for billions of artifacts."""

SEAL = "sha256_of_the_rest"
"""Key under which a JSON file holds the digest of everything else in it: one flipped bit can leave readable JSON."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a quota, that has no room left."""

_BLOCK = 1 << 20


class HashingWriter:
    """A binary file object that hashes and counts what passes through it."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        self._raw = raw
        self._path = path
        self._hash = hashlib.sha256()
        self.bytes_written = 0
        self.error: Exception | None = None
        """Why a write failed, for those whose library goes on to fail in another way."""

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.bytes_written += memoryview(data).nbytes
        try:
            with says_when_the_disk_is_full(self._path, self.bytes_written):
                return self._raw.write(data)
        except Exception as error:
            self.error = error
            raise

    def flush(self) -> None:
        with says_when_the_disk_is_full(self._path, self.bytes_written):
            self._raw.flush()

    def sha256(self) -> str:
        return self._hash.hexdigest()


def keep_others_from_writing() -> None:
    """Of this process and those that it starts: nobody else may write to the files they make.

    A umask that keeps others out already is left alone: 002, say, where a group shares its folders.
    """
    present = os.umask(0o022)
    if not present & 0o002:
        present |= 0o022
    os.umask(present)


def fsync_path(path: Path) -> None:
    """Makes the content of a file, or a rename inside of a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """What is left of the disk that `path` lies on, or would lie on."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free


@contextmanager
def says_when_the_disk_is_full(path: Path, needed: int) -> Iterator[None]:
    """Turns the system's error into one with a remedy; needed: bytes of the file at `path` so far, the pending ones included."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DataError(
            f"{path}: disk full, it needs at least {needed:,} bytes and {free_bytes(path):,} are free; "
            "what was there before is untouched. Free some space and run again"
        ) from None


@contextmanager
def atomic_writer(path: Path) -> Iterator[HashingWriter]:
    """Opens a file that takes its name only when the block ends without an error.

    Raises:
        DataError: the disk is full; the previous file at `path`, if any, is untouched.
        OSError: the disk refused a write for another reason; likewise.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with says_when_the_disk_is_full(path, 1):
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

    A sealed one carries a digest of itself, for `read_json`; files that other programs define are written without.
    """
    seal = {SEAL: _seal(json.loads(json.dumps(value)))} if sealed else {}
    with atomic_writer(path) as file:
        file.write((json.dumps(dict(value) | seal, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
        return file.sha256()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that `write_json` sealed, and takes the seal off.

    Raises:
        DataError: the file is missing, not a JSON object or not as it was written; the message names it.
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
            f"{path}: damaged or edited by hand, it does not match its own digest; restore it or delete it to rebuild"
        )
    return value


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, sha256: str) -> None:
    """Checks a file against the digest its manifest holds.

    Raises:
        DataError: the file is missing or its bytes differ.
    """
    if not path.is_file():
        raise DataError(f"{path}: the manifest names this file, but it is missing")
    found = sha256_file(path)
    if found != sha256:
        raise DataError(f"{path}: damaged (SHA-256 {found[:12]}..., the manifest says {sha256[:12]}...)")


def _inner(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} does not name a file inside of its folder")
    return name


InnerPath = Annotated[str, AfterValidator(_inner)]
"""Of a manifest: a path or id that leads nowhere else than into the manifest's own folder, whoever wrote it."""


def inside(folder: Path, name: str) -> Path:
    """The path of what a manifest in `folder` names.

    Raises:
        DataError: it would lie elsewhere.
    """
    try:
        return folder / _inner(name)
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder}: a file in it names another that is not there: {error}; restore it or delete it") from None


def content_id(*parts: Any) -> str:
    """Id of an artifact: a hash of everything that determines it, given as JSON-serialisable parts."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:ID_LENGTH]
