"""New text in the raw text folder, and the configuration of the runs launched for it."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from llm_core.cli import describe_invalid
from llm_core.corpus import load_scan, open_input_folder
from llm_core.errors import UserError
from llm_core.layout import Home
from pipeline.resources import Storage


class Retraining(dg.ConfigurableResource):
    """Limits on automatic training; set in definitions.py."""

    min_hours_between_runs: float = Field(
        default=1.0,
        ge=0,
        description="Minimum time between two runs that the sensor launches. Text that arrives in between is in the next run.",
    )
    max_new_bytes: int = Field(
        default=10 << 30,
        gt=0,
        description="No run is launched automatically for more new bytes than this, so that a folder added by accident does not "
        "start weeks of training. Launch a run manually to accept the text; the sensor then continues.",
    )

    def reason_to_refuse(self, text: "NewText") -> str | None:
        """Why this text must not start a training automatically; None if it may."""
        if text.new_bytes <= self.max_new_bytes:
            return None
        return (
            f"{text}, more than max_new_bytes {self.max_new_bytes:,} of the resource retraining: check that they belong there, "
            "then launch the job pretrain manually or raise the limit"
        )


@dataclass(frozen=True)
class NewText:
    """The raw text folder compared with the last snapshot; no file is opened."""

    # Hash of the path and stamp of every file.
    fingerprint: str
    files: int
    # Added or changed.
    new_files: int
    removed_files: int
    new_bytes: int

    @classmethod
    def find(cls, storage: Storage) -> "NewText":
        """Compares them now. Raises UserError if the folder is missing, cannot be listed, or has no text."""
        folder = open_input_folder(storage.raw_text).walk()
        if not folder.files:
            raise UserError(f"{storage.raw_text}: no text in it yet; put text files there")
        _, known = load_scan(storage.folders.prepared.root)
        digest = hashlib.sha256()
        for path, stamp in folder.files.items():
            digest.update(f"{path}\0{stamp}\n".encode())
        new = [stamp.size for path, stamp in folder.files.items() if known.get(path) != stamp]
        return cls(digest.hexdigest()[:16], len(folder.files), len(new), len(known.keys() - folder.files.keys()), sum(new))

    def __bool__(self) -> bool:
        return bool(self.new_files or self.removed_files)

    def __str__(self) -> str:
        return f"{self.new_files:,} new or changed files ({self.new_bytes:,} bytes), {self.removed_files:,} removed"


def retraining_config(storage: Storage) -> dict[str, Any]:
    """The content of `configs/retrain.yaml`, in the format of `dagster job execute -c`; empty if there is no such file.

    Raises:
        UserError: the file is not YAML.
    """
    for home in (storage.folders, Home(Path.cwd())):
        path = home.retraining_config
        if path.is_file():
            try:
                return dict(dg.config_from_files([str(path)]))
            except Exception as error:  # Dagster wraps YAML errors in several types
                raise UserError(f"{path}: not a run configuration in YAML ({error})") from error
    return {}


def configured_storage(storage: Storage, run_config: Mapping[str, Any]) -> Storage:
    """The storage of a run with this configuration: it may set another text folder or release line.

    Raises:
        UserError: an option is wrong, or refers to an environment variable that is not set here.
    """
    section: Any = run_config
    for name in ("resources", "storage", "config"):  # each may be empty
        section = (section.get(name) or {}) if isinstance(section, Mapping) else {}
    options = {"home": storage.home, "raw_text_dir": storage.raw_text_dir, "release_line": storage.release_line}
    given = {name: from_environment(f"resources.storage.config.{name}", value) for name, value in section.items()}
    try:
        return Storage(**options | given)
    except ValidationError as error:
        raise UserError(describe_invalid(error, prefix="resources.storage.config.")) from error


def from_environment(option: str, value: Any) -> Any:
    """The value of an option; `{env: NAME}` stands for an environment variable, as in a Dagster run.

    Raises:
        UserError: the variable is not set.
    """
    if not isinstance(value, Mapping) or list(value) != ["env"] or not isinstance(value["env"], str):
        return value
    if (content := os.environ.get(value["env"])) is None:
        raise UserError(
            f"{option} of the run configuration refers to the environment variable {value['env']}: it is not set here; set it "
            "for the code server"
        )
    return content
