"""Which shards, and which of their rows, make up one version of the tokenized text.

    manifests/<dataset_id>.json  one dataset version: its tokenizer, its shards with their digests, its totals
    metadata.json                the current version, with the window length and stride in use; the newest of each tokenizer

Manifests are written last: an interrupted build leaves the previous version valid.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from llm_core.dataset.shard import ShardEntry
from llm_core.errors import DataError, UserError
from llm_core.layout import PreparedData
from llm_core.system import InnerPath, parse_record, read_json, read_record, write_json

FORMAT_VERSION = 1
SPLITS = ("train", "val")


class TokenizerEntry(BaseModel):
    """The tokenizer of a dataset; `file` is relative to the folder of prepared data."""

    model_config = ConfigDict(frozen=True)

    tokenizer_id: InnerPath
    file: InnerPath
    sha256: str
    tokenizer_type: str
    vocab_size: int
    eot_id: int


class SplitTotals(BaseModel):
    """Totals of a split without removed rows; tokens include one end-of-text per document."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    documents: int
    bytes: int


class DatasetVersion(BaseModel):
    """One version of the tokenized text, as manifests/<dataset_id>.json holds it."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    dataset_id: InnerPath
    snapshot_id: InnerPath
    parent_dataset_id: str | None
    tokenizer: TokenizerEntry
    dtype: str
    config: dict[str, Any]
    splits: dict[str, SplitTotals]
    shards: list[ShardEntry]
    unknown_text: float | None = None  # share of the text that the tokenizer cannot spell; older versions did not record it

    @classmethod
    def read(cls, data_dir: Path, dataset_id: str) -> "DatasetVersion":
        """A version by its id.

        Raises:
            DataError: its manifest is missing or damaged.
        """
        return read_record(PreparedData(data_dir).manifest(dataset_id), cls)


class DatasetManifest(DatasetVersion):
    """A dataset version and the windows to cut from it; the windows are in metadata.json only."""

    max_length: int
    stride: int


def load_manifest(data_dir: Path, dataset_id: str | None = None, snapshot_id: str | None = None) -> DatasetManifest:
    """The current dataset, or another version by its id, with the current window length and stride.

    snapshot_id: the snapshot with the places of the documents; default: the one that the version was made from.

    Raises:
        UserError: there is no prepared data in `data_dir`, or no such version.
        DataError: the manifest is damaged or of another format version.
    """
    folder = PreparedData(data_dir)
    path = folder.metadata
    if not path.is_file():
        raise UserError(
            f"--data_dir {data_dir}: no prepared data (metadata.json is missing);"
            f" make it with: python -m llm_core.data_prep_tool --input_dir <your text> --output_dir {data_dir}"
        )
    content = read_json(path)
    if snapshot_id is not None and dataset_id is None:
        raise UserError(f"--snapshot_id {snapshot_id}: needs --dataset_id, the dataset whose documents are in that snapshot")
    if dataset_id is not None:
        windows = {name: content.get(name) for name in ("max_length", "stride")}
        path = folder.manifest(dataset_id)
        if not path.is_file():
            raise UserError(f"--dataset_id {dataset_id}: no such dataset in {path.parent}; leave it out to take the current one")
        content = read_json(path) | windows | ({"snapshot_id": snapshot_id} if snapshot_id is not None else {})
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: format version {content.get('format_version')}, this program reads {FORMAT_VERSION}")
    try:
        return parse_record(path, content, DatasetManifest)
    except DataError as error:
        raise DataError(f"{error}; prepare the data again") from None


def newest_of(tokenizer_id: str, data_dir: Path, current: DatasetManifest | None) -> DatasetManifest | None:
    """The dataset whose shards a new one with this tokenizer reuses."""
    if current is None or current.tokenizer.tokenizer_id == tokenizer_id:
        return current
    newest = _newest_by_tokenizer(data_dir, current).get(tokenizer_id)
    if newest is None or not PreparedData(data_dir).manifest(newest).is_file():  # never made, or removed since
        return None
    return load_manifest(data_dir, newest)


def _newest_by_tokenizer(data_dir: Path, current: DatasetManifest | None) -> dict[str, str]:
    """The newest dataset of each tokenizer used here, so that switching vocabularies tokenizes nothing again."""
    if current is None:
        return {}
    return read_json(PreparedData(data_dir).metadata).get("newest", {}) | {current.tokenizer.tokenizer_id: current.dataset_id}


def publish_manifest(data_dir: Path, manifest: DatasetManifest, current: DatasetManifest | None) -> DatasetManifest:
    """Writes the manifest and makes it current; an existing version keeps its manifest."""
    windows = {"max_length": manifest.max_length, "stride": manifest.stride}
    present = windows | {"snapshot_id": manifest.snapshot_id}  # the same documents may be in other files now
    folder = PreparedData(data_dir)
    path = folder.manifest(manifest.dataset_id)
    if path.is_file() and current:
        manifest = load_manifest(data_dir, manifest.dataset_id).model_copy(update=present)
    else:
        write_json(path, manifest.model_dump(exclude=set(windows)))
    if manifest != current:
        newest = _newest_by_tokenizer(data_dir, current) | {manifest.tokenizer.tokenizer_id: manifest.dataset_id}
        write_json(folder.metadata, manifest.model_dump() | {"newest": newest})
    return manifest
