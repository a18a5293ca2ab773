"""What lies in the raw text folder that no run has read yet, and what a run about it is launched with."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from llm_core.corpus.file_index import last_look
from llm_core.corpus.source import open_source
from llm_core.errors import DataError, UserError
from llm_core.files import read_json, write_json
from pipeline.resources import Storage

RUN_CONFIG = Path("configs", "retrain.yaml")
"""Run configuration of the runs that start by themselves, in the textmill home or else in the working directory."""


class Retraining(dg.ConfigurableResource):
    """When new text may start a training by itself; change it where definitions.py makes it."""

    min_hours_between_runs: float = Field(
        default=1.0, ge=0, description="The sensor launches no second run before; what lands meanwhile is in the next one."
    )
    max_new_bytes: int = Field(
        default=10 << 30,
        gt=0,
        description="With more new bytes than this no run is launched: a folder put there by accident must not start a training "
        "of weeks. A run launched by hand takes them, after which the sensor goes on.",
    )

    def reason_to_refuse(self, text: "NewText") -> str | None:
        """Why this much text is no matter for a machine alone; None if it is."""
        if text.new_bytes <= self.max_new_bytes:
            return None
        return (
            f"{text}, more than max_new_bytes {self.max_new_bytes:,} of the resource retraining: look whether they belong there, "
            "then launch the job pretrain by hand or raise the limit"
        )


@dataclass(frozen=True)
class NewText:
    """The raw text folder beside what the last snapshot has read of it; no file is opened to find out."""

    fingerprint: str
    """Of every file's path and stamp: another one whenever a file comes, goes or changes."""
    files: int
    new_files: int
    """Added and changed ones."""
    removed_files: int
    new_bytes: int

    @classmethod
    def find(cls, storage: Storage) -> "NewText":
        """Raises UserError if the folder is missing, cannot be listed, or holds no text."""
        folder = open_source(storage.raw_text).walk()
        if not folder.files:
            raise UserError(f"{storage.raw_text}: no text in it yet; put text files there")
        _, known = last_look(storage.processed)
        digest = hashlib.sha256()
        for path, stamp in folder.files.items():
            digest.update(f"{path}\0{stamp}\n".encode())
        new = [stamp.size for path, stamp in folder.files.items() if known.get(path) != stamp]
        return cls(digest.hexdigest()[:16], len(folder.files), len(new), len(known.keys() - folder.files.keys()), sum(new))

    def __bool__(self) -> bool:
        return bool(self.new_files or self.removed_files)

    def __str__(self) -> str:
        return f"{self.new_files:,} new or changed files ({self.new_bytes:,} bytes), {self.removed_files:,} removed"


def remember_decision(storage: Storage, snapshot_id: str) -> None:
    """Notes that a model of this text was released, or was not better: the text is done with."""
    if _decided_on(storage) != snapshot_id:
        write_json(storage.decision, {"snapshot_id": snapshot_id})


def is_decided(storage: Storage) -> bool:
    """Whether the last snapshot of the raw text is that of the last decision in this line of releases.

    A training of which any step failed comes to no decision, however far it read.
    """
    snapshot_id, _ = last_look(storage.processed)
    return snapshot_id is not None and snapshot_id == _decided_on(storage)


def _decided_on(storage: Storage) -> str | None:
    """The snapshot of the last decision; None if there is none yet, or its note is damaged: the next run then makes it again."""
    try:
        return read_json(storage.decision).get("snapshot_id")
    except DataError:
        return None


def retraining_config(storage: Storage) -> dict[str, Any]:
    """What `configs/retrain.yaml` says, in the form that `dagster job execute -c` takes; nothing if there is no such file.

    Raises:
        UserError: the file is not YAML.
    """
    for folder in (storage.root, Path.cwd()):
        path = folder / RUN_CONFIG
        if path.is_file():
            try:
                return dict(dg.config_from_files([str(path)]))
            except Exception as error:  # the YAML reader's own errors, wrapped differently by kind
                raise UserError(f"{path}: not a run configuration in YAML ({error})") from error
    return {}


def configured_storage(storage: Storage, run_config: Mapping[str, Any]) -> Storage:
    """The storage that a run with this configuration works on: it may read its text elsewhere, or release in another line.

    Raises:
        UserError: an environment variable that it names is not set here.
    """
    given: Any = run_config
    for name in ("resources", "storage", "config"):  # each may stand there empty
        given = (given.get(name) or {}) if isinstance(given, Mapping) else {}
    options = {"home": storage.home, "raw_text_dir": storage.raw_text_dir, "release_line": storage.release_line}
    return Storage(**options | {name: _from_environment(name, value) for name, value in given.items()})


def _from_environment(name: str, value: Any) -> Any:
    """What an option of a run configuration stands for: `{env: NAME}` is a variable's value, as Dagster reads it in a run."""
    if not isinstance(value, Mapping) or list(value) != ["env"]:
        return value
    if (found := os.environ.get(value["env"])) is None:
        raise UserError(
            f"resources.storage.config.{name} of the run configuration is the environment variable {value['env']}, which is not "
            "set here; set it for the code server"
        )
    return found
