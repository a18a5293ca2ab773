"""textmill.json: what an exported model was made from, and the digest of each of its files."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llm_core.errors import DataError
from llm_core.layout import ModelFolder
from llm_core.system import inside, read_record, verify_file, write_json


class ModelRecord(BaseModel):
    """The record of one exported model. Fields with a default are unknown for some models."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    model_id: str
    run_id: str
    parent_run_id: str | None = None
    checkpoint_id: str
    checkpoint_file: str
    step: int
    tokens_seen: int
    dataset_id: str
    snapshot_id: str | None = None
    dataset_tokens: int | None = None
    tokenizer_id: str
    code_version: str
    git_commit: str | None
    seed: int
    released_at: str
    reason: str
    metrics: dict[str, Any]
    files: dict[str, str] = {}  # name -> SHA-256
    removed_at: str | None = None  # when garbage collection removed these files, but for README.md

    @classmethod
    def read(cls, model_dir: Path) -> "ModelRecord":
        """The record of an exported model.

        Raises:
            DataError: it is missing or damaged.
        """
        return read_record(ModelFolder(model_dir).record, cls)

    def write(self, model_dir: Path) -> None:
        write_json(ModelFolder(model_dir).record, self.known_fields())

    def known_fields(self) -> dict[str, Any]:
        """All fields but those that are unknown; `git_commit` is None outside a repository, and is kept."""
        return self.model_dump(mode="json", exclude_none=True) | {"git_commit": self.git_commit}


def is_intact(model_dir: Path) -> bool:
    """Whether every file of an exported model matches its record, and garbage collection has not begun to remove them."""
    try:
        record = ModelRecord.read(model_dir)
        for name, sha256 in record.files.items():
            verify_file(inside(model_dir, name), sha256)
    except DataError:
        return False
    return record.removed_at is None
