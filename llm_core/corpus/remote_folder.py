"""A folder behind a URL, read through fsspec: object stores, servers, archives, memory."""

import io
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from llm_core.corpus.streams import BLOCK
from llm_core.corpus.types import READABLE, FolderListing, OpenFile, Stamp, extension_of, format_of
from llm_core.errors import DataError, UserError
from llm_core.system import is_unicode

# The names under which fsspec's file systems report the version of a file.
_DIGESTS = ("etag", "ETag", "md5", "md5Hash", "crc32c", "checksum", "sha256", "generation", "version_id", "VersionId")
_TIMES = ("mtime", "modified", "last_modified", "LastModified", "updated", "created")

# Seconds. A modification time without a fraction is trusted once it is older: a later write within the same second is invisible.
_COARSE_CLOCK = 2.0


def local_path(url: str) -> Path | None:
    """The path of a `file://` URL."""
    if url.startswith(("file://", "local://")) and "::" not in url:
        return Path(LocalFileSystem._strip_protocol(url))
    return None


class RemoteFolder:
    """An `InputFolder` on any fsspec file system; the package for its protocol must be installed."""

    def __init__(self, url: str, file_system: fsspec.AbstractFileSystem | None = None, root: str = "") -> None:
        """Raises UserError if no installed package supports the protocol. file_system, root: derived from the URL by default."""
        self._url = url.rstrip("/")
        try:
            self._fs, root = (file_system, root) if file_system else url_to_fs(url)
        except (ImportError, ValueError) as error:  # fsspec's message names the package to install
            raise UserError(f"--input_dir {url}: {error}") from None
        self._prefix = root.rstrip("/") + "/" if root else ""
        self._unknown = f"no version known, scan {uuid.uuid4().hex}"

    def address(self, path: str) -> str:
        return f"{self._url}/{path}"

    def walk(self) -> FolderListing:
        listing = FolderListing()
        for name, info in sorted(self._find().items()):
            path = name.removeprefix(self._prefix).lstrip("/")
            if not name.startswith(self._prefix):
                listing.skipped["out_of_folder"] += 1
            elif any(name.startswith(".") for name in path.split("/")):
                listing.skipped["hidden"] += 1
            elif not is_unicode(path):
                listing.skipped["name_not_utf8"] += 1
            elif format_of(path) is None:
                listing.ignored[extension_of(path)] += 1
            elif info["type"] != "file":  # links have another type
                listing.skipped["not_a_regular_file"] += 1
            else:
                listing.files[path] = self._stamp(info)
        listing.files = dict(sorted(listing.files.items()))
        return listing

    @contextmanager
    def open(self, path: str) -> Iterator[OpenFile]:
        address = self._prefix + path
        with _reaching(self.address(path)):
            file = self._fs.open(address, "rb")
        with file:
            raw = io.BufferedReader(_RemoteFile(file, self.address(path)), BLOCK)
            current_stamp = partial(self._current_stamp, address)
            yield OpenFile(raw, current_stamp, current_stamp)

    def _find(self) -> dict[str, dict[str, Any]]:
        try:
            self._fs.invalidate_cache()
            files: dict[str, dict[str, Any]] = self._fs.find(self._prefix, detail=True)
            missing = not files and not self._fs.isdir(self._prefix)
        except FileNotFoundError:
            missing = True
        except Exception as error:  # each file system has its own errors
            raise UserError(f"--input_dir {self._url}: cannot be listed ({error}); check the address and your access") from error
        if missing:
            raise UserError(f"--input_dir {self._url}: no such folder; create it and put {READABLE} files into it")
        return files

    def _current_stamp(self, address: str) -> Stamp:
        with _reaching(address):
            self._fs.invalidate_cache()
            return self._stamp(self._fs.info(address))

    def _stamp(self, info: dict[str, Any]) -> Stamp:
        digests = {name: str(info[name]) for name in _DIGESTS if info.get(name)}
        moment = _moment(next((info[name] for name in _TIMES if info.get(name)), None))
        certain = digests or (moment and (moment % 1 or time.time() - moment > _COARSE_CLOCK))
        tag = json.dumps(digests, sort_keys=True) if certain else self._unknown
        return Stamp(info.get("size") or 0, int((moment or 0.0) * 1e9), info.get("ino") or 0, tag=tag)


class _RemoteFile(io.RawIOBase):
    """An fsspec file for `io.BufferedReader`; a failing connection is not reported as a broken file."""

    def __init__(self, file: Any, address: str) -> None:
        self._file = file
        self._address = address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _reaching(self._address):
            return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with _reaching(self._address):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _reaching(address: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError):  # about this file
        raise
    except Exception as error:  # each file system has its own errors
        raise DataError(f"{address}: could not be read ({error}); run again when the storage can be reached") from error


def _moment(value: Any) -> float | None:
    """Seconds since 1970; None if the format of the time is unknown."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else None
