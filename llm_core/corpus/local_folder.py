"""A local folder of raw text: its readable files in a fixed order, and never a file outside it."""

import errno
import io
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llm_core.corpus.types import READABLE, FolderListing, OpenFile, Stamp, extension_of, format_of
from llm_core.errors import UserError
from llm_core.system import is_unicode

_FLAGS = os.O_RDONLY | os.O_CLOEXEC

# Files of at most this many bytes are read in one call.
_SMALL = 1 << 20


class LocalFolder:
    """A local `InputFolder`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders = OpenFolder(root)

    def address(self, path: str) -> str:
        return str(self.root / path)

    def walk(self) -> FolderListing:
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
                # Python's file objects would double the time of reading many small files.
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
    """Opens files below a root without following links: a folder may have been replaced by a link since the walk.

    The folder of the previous file stays open: files come folder by folder, and opening the folder takes as long as a small file.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = root
        self._folder, self._descriptor = "", -1

    def open(self, path: str) -> int:
        """A descriptor of a file. O_NONBLOCK: a FIFO in the file's place must not block."""
        folder, _, name = path.rpartition("/")
        flags = _FLAGS | os.O_NONBLOCK | os.O_NOFOLLOW
        if self._descriptor >= 0 and folder == self._folder:
            try:
                return os.open(name, flags, dir_fd=self._descriptor)
            except FileNotFoundError:  # the folder may have been replaced
                pass
        self._enter(folder)
        return os.open(name, flags, dir_fd=self._descriptor)

    def _enter(self, folder: str) -> None:
        self.close()
        self._folder, self._descriptor = folder, os.open(self.root, _FLAGS | os.O_DIRECTORY)
        for name in folder.split("/") if folder else []:
            outer = self._descriptor
            try:
                self._descriptor = os.open(name, _FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
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
    """A descriptor of a file. The target of a link is checked again: the link may be newer than the walk."""
    try:
        return folders.open(path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    root, target = os.path.realpath(folders.root), os.path.realpath(f"{folders.root}/{path}")
    if not _is_inside(target, root):
        raise OSError(errno.ELOOP, "a link that leaves the folder", path)
    return OpenFolder(root).open(os.path.relpath(target, root))


def walk(input_dir: Path) -> FolderListing:
    """Lists the files of `input_dir` and its subfolders without opening any.

    Hidden names, FIFOs, sockets, devices, links out of the folder and links to folders are skipped. A link to a file inside the
    folder is read under the name of the link.

    Raises:
        UserError: the folder is missing or cannot be listed.
    """
    if not input_dir.is_dir():
        if input_dir.exists():
            raise UserError(f"--input_dir {input_dir}: is a file; name the folder that contains it")
        raise UserError(f"--input_dir {input_dir}: no such folder; create it and put {READABLE} files into it")
    root = os.path.realpath(input_dir)
    listing = FolderListing()
    for path, entry in _entries(root, "", listing.skipped):
        if format_of(path) is None:
            listing.ignored[extension_of(path)] += 1
            continue
        try:
            status = entry.stat()
        except OSError:  # a dangling link, or removed a moment ago
            listing.skipped["vanished"] += 1
            continue
        if entry.is_symlink() and not _is_inside(os.path.realpath(entry.path), root):
            listing.skipped["link_out_of_folder"] += 1
        elif not stat.S_ISREG(status.st_mode):
            listing.skipped["not_a_regular_file"] += 1
        else:
            listing.files[path] = Stamp.of(status)
    listing.files = dict(sorted(listing.files.items()))
    return listing


def _is_inside(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _entries(directory: str, prefix: str, skipped: Counter[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Entries that are neither hidden nor folders, with their paths from the root."""
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
    except OSError:  # a link to itself, which `walk` counts
        return False
