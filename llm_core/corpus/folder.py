"""What lies in a folder: the files that can be read, in one fixed order, and nothing outside of it."""

import errno
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

from llm_core.errors import UserError

Format = Literal["text", "jsonl", "parquet"]

_FORMATS: dict[str, Format] = {"txt": "text", "md": "text", "jsonl": "jsonl", "parquet": "parquet"}
_COMPRESSIONS = ("gz", "zst")

_FLAGS = os.O_RDONLY | os.O_CLOEXEC

_SMALL = 1 << 20
"""Bytes up to which a file is read at once."""

READABLE = ".txt, .md, .jsonl or .parquet"
"""For messages; each of these may also end in .gz or .zst."""


def format_of(path: str) -> Format | None:
    """Format of a file by its name, compressed or not; None for a name we do not read."""
    stem, _, suffix = path.lower().rpartition(".")
    if suffix in _COMPRESSIONS:
        stem, _, suffix = stem.rpartition(".")
    return _FORMATS.get(suffix) if stem else None


def source_of(path: str) -> str:
    """The source of a raw file: the top-level folder it lies in, "." for a file that lies in none."""
    folder, slash, _ = path.partition("/")
    return folder if slash else "."


class Stamp(NamedTuple):
    """What changes when a file's content does; equal stamps spare us opening the file."""

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int = 0
    """Nobody can set it: it tells of a file that was written anew and given its old time, as archives are unpacked."""
    tag: str = ""
    """What a remote file system says about the version of a file."""

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


@dataclass
class Folder:
    """Readable files with their stamps, sorted by path (posix, relative), and counts of what was passed over."""

    files: dict[str, Stamp] = field(default_factory=dict)
    ignored: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class OpenFile(NamedTuple):
    """A buffered file that can seek, and functions that tell its stamp: when it was opened, and now."""

    raw: IO[bytes]
    opened: Callable[[], Stamp]
    look: Callable[[], Stamp]


class LocalFolder:
    """A folder of this machine as a `Source`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders = OpenFolder(root)

    def address(self, path: str) -> str:
        return str(self.root / path)

    def walk(self) -> Folder:
        return walk(self.root)

    @contextmanager
    def open(self, path: str) -> Iterator[OpenFile]:
        descriptor = _open_inside(self._folders, path)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "not a regular file")
            raw: IO[bytes]
            if status.st_size <= _SMALL:
                # Read at once: of many small files, the layers of an open file would take as long as all the rest.
                data = os.read(descriptor, status.st_size + 1)
                while len(data) < status.st_size and (more := os.read(descriptor, status.st_size)):
                    data += more
                raw = io.BytesIO(data)
            else:
                raw = open(descriptor, "rb", closefd=False)
            yield OpenFile(raw, lambda: Stamp.of(status), lambda: Stamp.of(os.fstat(descriptor)))
        finally:
            os.close(descriptor)


class OpenFolder:
    """Opens files below a root without following a link on the way: a folder may have been replaced by one since the walk.

    The folder of the file before is kept open: files come folder by folder, and of many small ones its opening would take as long
    as theirs.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = root
        self._folder, self._descriptor = "", -1

    def open(self, path: str) -> int:
        """A descriptor. O_NONBLOCK, so that a FIFO put in the file's place cannot hold us."""
        folder, _, name = path.rpartition("/")
        flags = _FLAGS | os.O_NONBLOCK | os.O_NOFOLLOW
        if self._descriptor >= 0 and folder == self._folder:
            try:
                return os.open(name, flags, dir_fd=self._descriptor)
            except FileNotFoundError:  # another folder may have taken its place
                pass
        self._enter(folder)
        return os.open(name, flags, dir_fd=self._descriptor)

    def _enter(self, folder: str) -> None:
        self.close()
        self._folder, self._descriptor = folder, os.open(self.root, _FLAGS | os.O_DIRECTORY)
        for part in folder.split("/") if folder else []:
            outer = self._descriptor
            try:
                self._descriptor = os.open(part, _FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
            except OSError:
                self._descriptor = -1
                raise
            finally:
                os.close(outer)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = close


def _open_inside(folders: OpenFolder, path: str) -> int:
    """A descriptor. Where a file is a link, its target is looked at once more: it may have been put there after the walk."""
    try:
        return folders.open(path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    root, target = os.path.realpath(folders.root), os.path.realpath(f"{folders.root}/{path}")
    if not _is_inside(target, root):
        raise OSError(errno.ELOOP, "a link that leaves the folder", path)
    return OpenFolder(root).open(os.path.relpath(target, root))


def walk(input_dir: Path) -> Folder:
    """Looks through `input_dir` and its subfolders without opening a file.

    Hidden names, FIFOs, sockets and devices are skipped. A link to a file inside the folder is read under the link's name;
    links that leave the folder and links to folders (their target is walked anyway) are skipped.

    Raises:
        UserError: the folder is missing or cannot be listed.
    """
    if not input_dir.is_dir():
        if input_dir.exists():
            raise UserError(f"--input_dir {input_dir}: is a file; name the folder that it lies in")
        raise UserError(f"--input_dir {input_dir}: no such folder; create it and put {READABLE} files into it")
    root = os.path.realpath(input_dir)
    found = Folder()
    for path, entry in _entries(root, "", found.skipped):
        if format_of(path) is None:
            found.ignored += 1
            continue
        try:
            status = entry.stat()
        except OSError:  # a dangling link, or removed a moment ago
            found.skipped["vanished"] += 1
            continue
        if entry.is_symlink() and not _is_inside(os.path.realpath(entry.path), root):
            found.skipped["link_out_of_folder"] += 1
        elif not stat.S_ISREG(status.st_mode):
            found.skipped["not_a_regular_file"] += 1
        else:
            found.files[path] = Stamp.of(status)
    found.files = dict(sorted(found.files.items()))
    return found


def _is_inside(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _entries(directory: str, prefix: str, skipped: Counter[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry that is neither hidden nor a folder, with its path from the root."""
    try:
        entries = list(os.scandir(directory))
    except FileNotFoundError:  # removed a moment ago
        skipped["vanished"] += 1
        return
    except OSError as error:
        raise UserError(f"--input_dir: cannot list {directory} ({error.strerror}); make it readable or move it away") from None
    for entry in entries:
        path = prefix + entry.name
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif not is_unicode(entry.name):
            skipped["name_not_utf8"] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from _entries(entry.path, path + "/", skipped)
        elif _leads_to_folder(entry):
            skipped["link_to_folder"] += 1
        else:
            yield path, entry


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; `walk` counts it
        return False


def is_unicode(name: str) -> bool:
    """Whether a file's name can be written in UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:  # the system hands undecodable bytes over as lone surrogates
        return False
    return True
