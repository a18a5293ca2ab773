"""Where a corpus lies: a folder of this machine, or one behind a URL that fsspec understands."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from llm_core.corpus.folder import Folder, LocalFolder, OpenFile

InputDir = str | Path
"""A path, or a URL as a string (`s3://bucket/texts`); a Path cannot hold a URL."""


class Source(Protocol):
    """What the rest of the package needs of a place; paths are posix and relative to it."""

    def walk(self) -> Folder:
        """Looks through the place without opening a file.

        Raises:
            UserError: it is missing or cannot be listed.
        """

    def open(self, path: str) -> AbstractContextManager[OpenFile]:
        """Opens a file.

        Raises:
            OSError: this file cannot be read.
            DataError: the place as a whole cannot be reached.
        """

    def address(self, path: str) -> str:
        """The file's name in messages."""


def open_source(input_dir: InputDir) -> Source:
    """The place that a path or a URL names; `file://` is a folder like any other.

    Raises:
        UserError: nothing here understands that URL.
    """
    if not is_url(input_dir):
        return LocalFolder(Path(input_dir))
    from llm_core.corpus.remote import RemoteFolder, local_path  # only who has a URL waits for fsspec

    local = local_path(str(input_dir))
    return LocalFolder(local) if local else RemoteFolder(str(input_dir))


def is_url(input_dir: InputDir) -> bool:
    return isinstance(input_dir, str) and "://" in input_dir
