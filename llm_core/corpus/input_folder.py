"""The folder of raw text: a local one, or one behind an fsspec URL."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from llm_core.corpus.local_folder import LocalFolder
from llm_core.corpus.types import FolderListing, OpenFile

# A path, or a URL as a string (`s3://bucket/texts`), which a Path cannot hold.
InputDir = str | Path


class InputFolder(Protocol):
    """A folder of raw text. Paths are posix and relative to it."""

    def walk(self) -> FolderListing:
        """Lists the files without opening any.

        Raises:
            UserError: the folder is missing or cannot be listed.
        """

    def open(self, path: str) -> AbstractContextManager[OpenFile]:
        """Opens a file.

        Raises:
            OSError: this file cannot be read.
            DataError: the folder cannot be reached.
        """

    def address(self, path: str) -> str:
        """The file's name for messages."""


def open_input_folder(input_dir: InputDir) -> InputFolder:
    """The folder of a path or URL; `file://` is a local folder.

    Raises:
        UserError: no installed package supports the URL.
    """
    if not is_url(input_dir):
        return LocalFolder(Path(input_dir))
    from llm_core.corpus.remote_folder import RemoteFolder, local_path  # fsspec is slow to load

    local = local_path(str(input_dir))
    return LocalFolder(local) if local else RemoteFolder(str(input_dir))


def is_url(input_dir: InputDir) -> bool:
    return isinstance(input_dir, str) and "://" in input_dir
