"""A local folder of raw text: its readable files in a fixed order, and never a file outside it."""

import errno
import io
import os
import stat
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

    The folder of the previous file stays open, and the next one is reached from it, by its name or by "..": files come folder by
    folder, and opening the folder takes as long as a small file. So a path may be longer than the system allows, and a tree of
    any depth takes one step per folder.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = root
        self._folder, self._descriptor = "", -1
        self._above: list[tuple[int, int]] = []  # device and inode of each folder on the way to the open one

    def open(self, path: str) -> int:
        """A descriptor of a file. O_NONBLOCK: a FIFO in the file's place must not block."""
        folder, _, name = path.rpartition("/")
        flags = _FLAGS | os.O_NONBLOCK | os.O_NOFOLLOW
        if self._descriptor >= 0 and folder == self._folder:
            try:
                return os.open(name, flags, dir_fd=self._descriptor)
            except FileNotFoundError:  # the folder may have been replaced
                self.close()
        return os.open(name, flags, dir_fd=self.enter(folder))

    def enter(self, folder: str) -> int:
        """A descriptor of a folder, valid until the next call. folder: its path from the root, which is ""."""
        if self._descriptor >= 0:
            try:
                self._walk_to(folder)
            except OSError:  # a folder on the way may have been moved or replaced: again from the root
                self.close()
        if self._descriptor < 0:
            self._folder, self._above = "", []
            self._move(self.root, _FLAGS | os.O_DIRECTORY)
            self._walk_to(folder)
        return self._descriptor

    def _walk_to(self, folder: str) -> None:
        while self._folder and not f"{folder}/".startswith(f"{self._folder}/"):
            self._folder = self._folder.rpartition("/")[0]
            self._move("..", _FLAGS | os.O_DIRECTORY)
            if self._identity() != self._above.pop():
                raise OSError("the folder was moved")
        rest = folder[len(self._folder) :].lstrip("/")
        self._folder = folder
        for name in rest.split("/") if rest else []:
            self._above.append(self._identity())
            self._move(name, _FLAGS | os.O_DIRECTORY | os.O_NOFOLLOW)

    def _move(self, name: Path | str, flags: int) -> None:
        """Opens a folder in place of the open one, relative to it."""
        left = self._descriptor
        try:
            self._descriptor = os.open(name, flags, dir_fd=left if left >= 0 else None)
        except OSError:
            self._descriptor = -1
            raise
        finally:
            if left >= 0:
                os.close(left)

    def _identity(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino

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
    folder is read under the name of the link. A subfolder that cannot be listed is skipped, with its name.

    Raises:
        UserError: the folder is missing or cannot be listed.
    """
    if not input_dir.is_dir():
        if input_dir.exists():
            raise UserError(f"--input_dir {input_dir}: is a file; name the folder that contains it")
        raise UserError(f"--input_dir {input_dir}: no such folder; create it and put {READABLE} files into it")
    root = os.path.realpath(input_dir)
    listing = FolderListing()
    folders, to_list = OpenFolder(root), [""]
    while to_list:
        folder = to_list.pop()
        for entry in _entries(folders, folder, listing):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                listing.skipped["hidden"] += 1
            elif not is_unicode(entry.name):
                listing.skipped["name_not_utf8"] += 1
            elif entry.is_dir(follow_symlinks=False):
                to_list.append(path)
            elif _leads_to_folder(entry):
                listing.skipped["link_to_folder"] += 1
            elif format_of(entry.name) is None:
                listing.ignored[extension_of(path)] += 1
            else:
                _add_file(listing, path, entry, root)
    listing.files = dict(sorted(listing.files.items()))
    return listing


def _entries(folders: OpenFolder, folder: str, listing: FolderListing) -> list[os.DirEntry[str]]:
    """The entries of a folder, which stays open until the next call, so that they can be examined."""
    try:
        with os.scandir(folders.enter(folder)) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):  # removed or replaced a moment ago
        listing.skipped["vanished"] += 1
    except OSError as error:
        if not folder:
            raise UserError(f"--input_dir {folders.root}: cannot be listed ({error.strerror}); make it readable") from None
        listing.skipped["unreadable_folder"] += 1
        listing.unreadable_folders.append(folder)
    return []


def _add_file(listing: FolderListing, path: str, entry: os.DirEntry[str], root: str) -> None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        listing.skipped["broken_link" if entry.is_symlink() else "vanished"] += 1
        return
    except OSError as error:
        if error.errno == errno.ELOOP:  # links that lead to each other
            listing.skipped["broken_link"] += 1
        else:  # a folder that can be listed, but not entered: the file is quarantined when it is opened
            listing.files[path] = Stamp(0, 0, 0)
        return
    if entry.is_symlink() and not _is_inside(os.path.realpath(f"{root}/{path}"), root):
        listing.skipped["link_out_of_folder"] += 1
    elif not stat.S_ISREG(status.st_mode):
        listing.skipped["not_a_regular_file"] += 1
    else:
        listing.files[path] = Stamp.of(status)


def _is_inside(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which `walk` counts
        return False
