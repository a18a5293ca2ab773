"""What the training says through Dagster Pipes, read when somebody looks.

Dagster's own reader of a message file is a thread that looks a hundred times a second, on cores that are the training's.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dagster import PipesMessageHandler, PipesMessageReader
from dagster_pipes import PipesDefaultMessageWriter, PipesParams


class MessageFile(PipesMessageReader):
    """Messages in a file, one to a line. What comes between the last `read` and the end of the session is read at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = b""

    @property
    def expected_writer_count(self) -> int:
        """The first rank alone; Dagster's own answer, the same, warns every run of being a preview."""
        return 1

    @contextmanager
    def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
        self._handler = handler
        with open(self._path, "x+b") as self._file:
            try:
                yield {PipesDefaultMessageWriter.FILE_PATH_KEY: str(self._path)}
            finally:
                self.read()

    def read(self) -> None:
        """Hands on the whole lines that are new. One that nobody can read is told in the run's log; no training ends for it."""
        *lines, self._torn = (self._torn + self._file.read()).split(b"\n")
        for line in lines:
            try:
                self._handler.handle_message(json.loads(line))
            except Exception:
                self._handler.report_pipes_framework_exception(f"{self._path}: {line!r}", sys.exc_info())

    def no_messages_debug_text(self) -> str:
        return f"No message came in {self._path}."
