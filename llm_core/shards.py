"""The dataset: which shards, and which of their rows, make up one version of the tokenized text.

    manifests/<dataset_id>.json  one dataset version: its tokenizer, its shards with their digests, its totals
    metadata.json                the current version, with the window length and stride in use; the newest of each tokenizer

New text makes new shards; text that has gone is listed in a shard's `removed_rows`. Manifests are written last: an interrupted
build leaves the previous version valid. Windows are cut when shards are read: max_length and stride change no file of tokens.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from llm_core.config import ShardConfig
from llm_core.corpus import InputDir, Snapshot, iter_texts
from llm_core.encoding import encode_all
from llm_core.errors import DataError, UserError
from llm_core.files import InnerPath, content_id, inside, read_json, write_json
from llm_core.shard_file import ShardEntry, ShardWriter, mend_facts, open_tokens, read_facts
from llm_core.tables import iter_rows
from llm_core.tokenizer import Tokenizer
from llm_core.tokenizer_store import TokenizerArtifact

__all__ = [
    "DatasetManifest",
    "ShardEntry",
    "build_dataset",
    "load_manifest",
    "open_tokens",
    "read_facts",
]

FORMAT_VERSION = 1
SPLITS = ("train", "val")

_PROGRESS_BYTES = 4 << 20
"""Of text, from one report of progress to the next."""


class TokenizerEntry(BaseModel):
    """The tokenizer of a dataset; `file` is relative to the processed directory."""

    model_config = ConfigDict(frozen=True)

    tokenizer_id: InnerPath
    file: InnerPath
    sha256: str
    tokenizer_type: str
    vocab_size: int
    eot_id: int


class SplitTotals(BaseModel):
    """What a split holds without its removed rows; tokens include one end-of-text per document."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    documents: int
    bytes: int


class DatasetManifest(BaseModel):
    """One dataset version, and the windows that its user asked for (these stand in metadata.json only)."""

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
    max_length: int
    stride: int


def load_manifest(processed_dir: Path, dataset_id: str | None = None, snapshot_id: str | None = None) -> DatasetManifest:
    """The current dataset, or another version by its id (with the current window length and stride).

    snapshot_id: where the documents of that version lie, if not where they lay when it was first made.

    Raises:
        UserError: there is no prepared data in `processed_dir`, or no such version.
        DataError: the manifest is damaged or of another format version.
    """
    path = processed_dir / "metadata.json"
    if not path.is_file():
        raise UserError(
            f"--data_dir {processed_dir}: no prepared data (metadata.json is missing);"
            f" make it with: python -m llm_core.data_prep_tool --input_dir <your text> --output_dir {processed_dir}"
        )
    content = read_json(path)
    if snapshot_id is not None and dataset_id is None:
        raise UserError(f"--snapshot_id {snapshot_id}: only with --dataset_id, which says what dataset lies in that snapshot")
    if dataset_id is not None:
        windows = {name: content.get(name) for name in ("max_length", "stride")}
        path = inside(processed_dir / "manifests", f"{dataset_id}.json")
        if not path.is_file():
            raise UserError(f"--dataset_id {dataset_id}: no such dataset in {path.parent}; leave it out to take the current one")
        content = read_json(path) | windows | ({"snapshot_id": snapshot_id} if snapshot_id is not None else {})
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path}: format version {content.get('format_version')}, this program reads {FORMAT_VERSION}")
    try:
        return DatasetManifest.model_validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{path}: not a dataset manifest ({where}: {error.errors()[0]['msg']}); prepare the data again") from None


def build_dataset(
    snapshot: Snapshot,
    artifact: TokenizerArtifact,
    input_dir: InputDir,
    processed_dir: Path,
    config: ShardConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetManifest:
    """Tokenizes what the newest dataset of this tokenizer lacks and publishes the next version.

    `on_progress` gets (done, all) bytes of text. If nothing is new, nothing is written.

    Raises:
        DataError: the text changed since the snapshot, or metadata.json is damaged.
        UserError: the engine is not there.
    """
    tokenizer = artifact.tokenizer
    current = load_manifest(processed_dir) if (processed_dir / "metadata.json").is_file() else None
    parent = _newest_of(tokenizer.tokenizer_id, processed_dir, current)

    documents = snapshot.kept_documents()
    shards: list[ShardEntry] = []
    missing = []
    for split in SPLITS:
        wanted = documents.filter(pc.equal(documents["split"], split))
        reused, stored_ids = _reuse(processed_dir, parent, split, wanted["document_id"])
        shards += reused
        missing.append(wanted.filter(pc.invert(pc.is_in(wanted["document_id"], value_set=stored_ids))))
    to_encode = pa.concat_tables(missing).sort_by([(name, "ascending") for name in ("path", "start", "text_start")])
    texts = iter_texts(input_dir, to_encode, snapshot.config)
    shards += _encode(to_encode, texts, tokenizer, processed_dir, config, on_progress)
    # Within a split the oldest come first; one that was lost and made again takes its old place.
    places = {shard.shard_id: place for place, shard in enumerate(parent.shards)} if parent else {}
    shards.sort(key=lambda shard: (SPLITS.index(shard.split), places.get(shard.shard_id, len(places))))

    dataset_id = content_id(
        FORMAT_VERSION, tokenizer.tokenizer_id, [(shard.shard_id, shard.split, shard.removed_rows) for shard in shards]
    )
    manifest = DatasetManifest(
        dataset_id=dataset_id,
        snapshot_id=snapshot.snapshot_id,
        parent_dataset_id=current.dataset_id if current else None,
        tokenizer=TokenizerEntry(
            tokenizer_id=tokenizer.tokenizer_id,
            file=artifact.file,
            sha256=artifact.sha256,
            tokenizer_type=tokenizer.tokenizer_type,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
        ),
        dtype=tokenizer.dtype.name,
        config=config.identity(),
        splits={split: _totals(processed_dir, shards, split) for split in SPLITS},
        shards=shards,
        max_length=config.max_length,
        stride=config.stride,
    )
    return _publish(processed_dir, manifest, current)


def _newest_of(tokenizer_id: str, processed_dir: Path, current: DatasetManifest | None) -> DatasetManifest | None:
    """The dataset whose shards a new one with this tokenizer takes over."""
    if current is None or current.tokenizer.tokenizer_id == tokenizer_id:
        return current
    newest = _newest(processed_dir, current).get(tokenizer_id)
    if newest is None or not inside(processed_dir / "manifests", f"{newest}.json").is_file():  # never made, or garbage since
        return None
    return load_manifest(processed_dir, newest)


def _newest(processed_dir: Path, current: DatasetManifest | None) -> dict[str, str]:
    """The newest dataset of each tokenizer that was used here, so that a run with another vocabulary starts nothing anew."""
    if current is None:
        return {}
    return read_json(processed_dir / "metadata.json").get("newest", {}) | {current.tokenizer.tokenizer_id: current.dataset_id}


def _publish(processed_dir: Path, manifest: DatasetManifest, current: DatasetManifest | None) -> DatasetManifest:
    """Writes the manifest and makes it current; a version that exists already keeps the manifest it has."""
    windows = {"max_length": manifest.max_length, "stride": manifest.stride}
    present = windows | {"snapshot_id": manifest.snapshot_id}  # the same documents may lie in other files now
    path = processed_dir / "manifests" / f"{manifest.dataset_id}.json"
    if path.is_file() and current:
        manifest = load_manifest(processed_dir, manifest.dataset_id).model_copy(update=present)
    else:
        write_json(path, manifest.model_dump(exclude=set(windows)))
    if manifest != current:
        newest = _newest(processed_dir, current) | {manifest.tokenizer.tokenizer_id: manifest.dataset_id}
        write_json(processed_dir / "metadata.json", manifest.model_dump() | {"newest": newest})
    return manifest


def _reuse(
    processed_dir: Path, parent: DatasetManifest | None, split: str, wanted_ids: pa.ChunkedArray
) -> tuple[list[ShardEntry], pa.Array]:
    """Shards of the parent that hold wanted documents, the rows of others marked as removed; and all ids in these shards."""
    shards, stored = [], [pa.array([], pa.large_string())]
    for shard in parent.shards if parent else []:
        if shard.split != split or not _is_whole(processed_dir / shard.file, shard.file_bytes):
            continue
        try:
            mend_facts(processed_dir, shard)
            ids = read_facts(processed_dir, shard)["document_id"].cast(pa.large_string()).combine_chunks()
        except DataError:  # its documents are encoded again
            continue
        removed = np.flatnonzero(~pc.is_in(ids, value_set=wanted_ids).to_numpy(zero_copy_only=False)).tolist()
        if len(removed) < shard.documents:
            shards.append(shard.model_copy(update={"removed_rows": removed}))
            stored.append(ids)
    return shards, pa.concat_arrays(stored)


def _encode(
    documents: pa.Table,
    texts: Iterator[str],
    tokenizer: Tokenizer,
    processed_dir: Path,
    config: ShardConfig,
    on_progress: Callable[[int, int], None] | None,
) -> list[ShardEntry]:
    """Encodes documents into new shards, in one pass over the text with one open shard per split.

    What goes into which shard follows from the sizes of the texts alone: no number of workers changes a byte.
    """
    all_bytes = pc.sum(documents["bytes"]).as_py() or 0
    done_bytes = reported_bytes = 0
    shards: list[Future[ShardEntry]] = []
    open_shards: dict[str, ShardWriter] = {}
    # A full shard is hashed and written while the text of the next one is encoded.
    with ThreadPoolExecutor(1) as publisher:

        def publish(split: str) -> None:
            if shards:
                shards[-1].result()  # one at a time, for the sake of the memory
            shards.append(publisher.submit(open_shards.pop(split).publish, processed_dir))

        encoded = encode_all(tokenizer, texts, config.num_workers, config.engine)
        rows = iter_rows(documents, "document_id", "split", "bytes")
        for (document_id, split, size), tokens in zip(rows, encoded, strict=True):
            if split in open_shards and open_shards[split].bytes + size > config.shard_bytes:
                publish(split)
            if split not in open_shards:
                open_shards[split] = ShardWriter(split, tokenizer)
            open_shards[split].add(document_id, size, tokens)
            done_bytes += size
            if on_progress and (done_bytes - reported_bytes >= _PROGRESS_BYTES or done_bytes == all_bytes):
                on_progress(done_bytes, all_bytes)
                reported_bytes = done_bytes
        for split in SPLITS:
            if split in open_shards:
                publish(split)
        return [shard.result() for shard in shards]


def _totals(processed_dir: Path, shards: list[ShardEntry], split: str) -> SplitTotals:
    tokens = documents = size = 0
    for shard in shards:
        if shard.split == split:
            removed = read_facts(processed_dir, shard).take(shard.removed_rows) if shard.removed_rows else None
            tokens += shard.tokens - (pc.sum(removed["token_count"]).as_py() if removed else 0)
            documents += shard.documents - len(shard.removed_rows)
            size += shard.bytes - (pc.sum(removed["bytes"]).as_py() if removed else 0)
    return SplitTotals(tokens=tokens, documents=documents, bytes=size)


def _is_whole(path: Path, size: int) -> bool:
    """Whether the file is there at its full size; its digest is compared when its tokens are opened."""
    return path.is_file() and path.stat().st_size == size
