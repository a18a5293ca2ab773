"""Builds a dataset version: reuses shards, encodes documents that no shard has, publishes the manifest.

New text makes new shards; removed text is listed in `removed_rows` of a shard. Windows are cut when shards are read, so that
max_length and stride change no file of tokens.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.config import ShardConfig
from llm_core.corpus import InputDir, Snapshot, iter_texts
from llm_core.dataset.manifest import (
    FORMAT_VERSION,
    SPLITS,
    DatasetManifest,
    SplitTotals,
    TokenizerEntry,
    load_manifest,
    newest_of,
    publish_manifest,
)
from llm_core.dataset.shard import ShardEntry, ShardWriter, read_index, repair_index
from llm_core.errors import DataError
from llm_core.layout import PreparedData
from llm_core.system import content_id, iter_rows
from llm_core.tokenizer import Tokenizer, TokenizerArtifact, encode_all, measure_drift


@dataclass(frozen=True)
class DatasetBuild:
    """A dataset version, and what this build did for it. The other documents are reused."""

    manifest: DatasetManifest
    documents_encoded: int
    bytes_encoded: int
    shards_written: int

    @property
    def documents_reused(self) -> int:
        return sum(split.documents for split in self.manifest.splits.values()) - self.documents_encoded


# Bytes of text between two progress reports.
_PROGRESS_BYTES = 4 << 20


def build_dataset(
    snapshot: Snapshot,
    artifact: TokenizerArtifact,
    input_dir: InputDir,
    data_dir: Path,
    config: ShardConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetBuild:
    """Tokenizes the documents that the newest dataset of this tokenizer lacks and publishes the next version.

    `on_progress` gets (done, all) bytes of text. If nothing is new, nothing is written.

    Raises:
        DataError: the text changed since the snapshot, or metadata.json is damaged.
        UserError: the engine is not available.
    """
    current = load_manifest(data_dir) if PreparedData(data_dir).metadata.is_file() else None
    parent = newest_of(artifact.tokenizer_id, data_dir, current)
    reused, to_encode = _split_work(data_dir, parent, snapshot.kept_documents())
    texts = iter_texts(input_dir, to_encode, snapshot.config)
    written = _encode(to_encode, texts, artifact.tokenizer, data_dir, config, on_progress)
    shards = reused + written
    # Within a split the oldest shard comes first; a shard that was lost and rebuilt returns to its old place.
    places = {shard.shard_id: place for place, shard in enumerate(parent.shards)} if parent else {}
    shards.sort(key=lambda shard: (SPLITS.index(shard.split), places.get(shard.shard_id, len(places))))
    unknown = measure_drift(artifact.tokenizer, artifact.report, snapshot, input_dir, data_dir).coverage.unknown
    manifest = publish_manifest(data_dir, _manifest(data_dir, snapshot, artifact, shards, config, current, unknown), current)
    return DatasetBuild(manifest, to_encode.num_rows, pc.sum(to_encode["bytes"]).as_py() or 0, len(written))


def _split_work(data_dir: Path, parent: DatasetManifest | None, documents: pa.Table) -> tuple[list[ShardEntry], pa.Table]:
    """Shards of the parent to reuse, and the documents that none of them has, in the order of the raw files."""
    shards: list[ShardEntry] = []
    missing = []
    for split in SPLITS:
        wanted = documents.filter(pc.equal(documents["split"], split))
        reused, stored_ids = _reuse(data_dir, parent, split, wanted["document_id"])
        shards += reused
        missing.append(wanted.filter(pc.invert(pc.is_in(wanted["document_id"], value_set=stored_ids))))
    return shards, pa.concat_tables(missing).sort_by([(name, "ascending") for name in ("path", "start", "text_start")])


def _manifest(
    data_dir: Path,
    snapshot: Snapshot,
    artifact: TokenizerArtifact,
    shards: list[ShardEntry],
    config: ShardConfig,
    current: DatasetManifest | None,
    unknown: float,
) -> DatasetManifest:
    tokenizer = artifact.tokenizer
    identity = [(shard.shard_id, shard.split, shard.removed_rows) for shard in shards]
    return DatasetManifest(
        dataset_id=content_id(FORMAT_VERSION, tokenizer.tokenizer_id, identity),
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
        splits={split: _totals(data_dir, shards, split) for split in SPLITS},
        shards=shards,
        unknown_text=unknown,
        max_length=config.max_length,
        stride=config.stride,
    )


def _reuse(
    data_dir: Path, parent: DatasetManifest | None, split: str, wanted_ids: pa.ChunkedArray
) -> tuple[list[ShardEntry], pa.Array]:
    """Shards of the parent with wanted documents, all other rows marked as removed; and all ids in these shards."""
    present, stored = [], []
    for shard in parent.shards if parent else []:
        if shard.split != split or not _has_full_size(data_dir / shard.file, shard.file_bytes):
            continue
        try:
            repair_index(data_dir, shard)
            stored.append(read_index(data_dir, shard)["document_id"].combine_chunks())
        except DataError:  # its documents are encoded again
            continue
        present.append(shard)
    # Of all shards at once: each call hashes all wanted ids.
    wanted = pc.is_in(pa.chunked_array(stored, pa.large_string()), value_set=wanted_ids).to_numpy()
    shards, reused_ids, start = [], [pa.array([], pa.large_string())], 0
    for shard, ids in zip(present, stored, strict=True):
        removed = np.flatnonzero(~wanted[start : start + len(ids)]).tolist()
        start += len(ids)
        if len(removed) < shard.documents:
            shards.append(shard.model_copy(update={"removed_rows": removed}))
            reused_ids.append(ids)
    return shards, pa.concat_arrays(reused_ids)


def _encode(
    documents: pa.Table,
    texts: Iterator[str],
    tokenizer: Tokenizer,
    data_dir: Path,
    config: ShardConfig,
    on_progress: Callable[[int, int], None] | None,
) -> list[ShardEntry]:
    """Encodes documents into new shards, in one pass over the text with one open shard per split.

    The sizes of the texts alone decide which shard they go to: the number of workers changes no byte.
    """
    all_bytes = pc.sum(documents["bytes"]).as_py() or 0
    done_bytes = reported_bytes = 0
    shards: list[Future[ShardEntry]] = []
    open_shards: dict[str, ShardWriter] = {}
    # A full shard is hashed and written while the text of the next one is encoded.
    with ThreadPoolExecutor(1) as publisher:

        def publish(split: str) -> None:
            if shards:
                shards[-1].result()  # one at a time, to bound memory
            shards.append(publisher.submit(open_shards.pop(split).publish, data_dir))

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


def _totals(data_dir: Path, shards: list[ShardEntry], split: str) -> SplitTotals:
    tokens = documents = size = 0
    for shard in shards:
        if shard.split == split:
            removed = read_index(data_dir, shard).take(shard.removed_rows) if shard.removed_rows else None
            tokens += shard.tokens - (pc.sum(removed["token_count"]).as_py() if removed else 0)
            documents += shard.documents - len(shard.removed_rows)
            size += shard.bytes - (pc.sum(removed["bytes"]).as_py() if removed else 0)
    return SplitTotals(tokens=tokens, documents=documents, bytes=size)


def _has_full_size(path: Path, size: int) -> bool:
    """Whether the file exists at its full size; its digest is checked when its tokens are opened."""
    return path.is_file() and path.stat().st_size == size
