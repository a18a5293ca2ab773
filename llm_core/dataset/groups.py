"""The tokens and documents of a split, all together or in groups such as sources."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus import source_of
from llm_core.dataset.manifest import DatasetManifest
from llm_core.dataset.shard import ShardEntry, TokenSlice, open_tokens, open_tokens_on_disk, read_index

Numbers = npt.NDArray[np.int64]

# A split with more shards is read from its files: a process may hold 65,530 memory maps, its libraries' and those of the other
# split included. To open a file takes some microseconds per window, which a training step does not notice.
MAX_MAPPED_SHARDS = 1 << 13


@dataclass(frozen=True)
class DocumentGroups:
    """Names of groups, and a function from document ids [documents] to the number of each one's group, -1 for none."""

    names: list[str]
    group_of: Callable[[pa.ChunkedArray], Numbers]


# One group of all documents.
ALL = DocumentGroups(["all"], lambda document_ids: np.zeros(len(document_ids), dtype=np.int64))


def token_slices(
    data_dir: Path, manifest: DatasetManifest, split: str, groups: DocumentGroups | None = None
) -> list[list[TokenSlice]]:
    """For each group the tokens of its documents in order, as views [tokens]. Verifies each shard.

    Raises:
        DataError: a shard is missing or damaged.
    """
    shards = _shards(manifest, split)
    open_shard = open_tokens if len(shards) <= MAX_MAPPED_SHARDS else open_tokens_on_disk
    slices: list[list[TokenSlice]] = [[] for _ in (groups or ALL).names]
    with_groups = _indexes_and_groups(data_dir, [shard for shard in shards if groups or shard.removed_rows], groups or ALL)
    for shard in shards:
        tokens = open_shard(data_dir, shard)
        if groups is None and not shard.removed_rows:
            slices[0].append(tokens)
            continue
        index, group_numbers = next(with_groups)
        ends = (index["token_start"].to_numpy() + index["token_count"].to_numpy()).tolist()
        # Adjacent documents of one group are one slice.
        changes = [0, *(np.flatnonzero(np.diff(group_numbers)) + 1).tolist(), len(group_numbers)]
        for first, last in itertools.pairwise(changes):
            if group_numbers[first] >= 0:
                slices[group_numbers[first]].append(tokens[ends[first - 1] if first else 0 : ends[last - 1]])
    return slices


def kept_documents(
    data_dir: Path, manifest: DatasetManifest, split: str, groups: DocumentGroups | None = None
) -> list[tuple[pa.ChunkedArray, Numbers]]:
    """For each group the ids [documents] in the order of its tokens, and their token counts [documents], end-of-text included."""
    ids: list[list[pa.Array]] = [[] for _ in (groups or ALL).names]
    counts: list[list[Numbers]] = [[np.empty(0, np.int64)] for _ in ids]
    for index, group_numbers in _indexes_and_groups(data_dir, _shards(manifest, split), groups or ALL):
        for group in range(len(ids)):
            chosen = index.filter(pa.array(group_numbers == group))
            ids[group] += chosen["document_id"].chunks
            counts[group].append(chosen["token_count"].to_numpy())
    return [
        (pa.chunked_array(chunks, pa.large_string()), np.concatenate(numbers))
        for chunks, numbers in zip(ids, counts, strict=True)
    ]


def groups_by_source(documents: pa.Table, names: list[str] | None = None) -> DocumentGroups:
    """One group per source, or per name in `names`. documents: the kept rows of a snapshot."""
    paths = documents["path"].combine_chunks().dictionary_encode()
    sources = [source_of(path) for path in paths.dictionary.to_pylist()]
    names = sorted(set(sources)) if names is None else names
    number_of = {name: number for number, name in enumerate(names)}
    source_numbers = np.array([number_of.get(source, -1) for source in sources], dtype=np.int64)
    of_row = source_numbers[paths.indices.to_numpy()]
    ids = documents["document_id"].combine_chunks()

    def group_of(document_ids: pa.ChunkedArray) -> Numbers:
        rows = pc.index_in(document_ids, value_set=ids)
        numbers: Numbers = np.append(of_row, -1)[pc.fill_null(rows, len(of_row)).to_numpy()]
        return numbers

    return DocumentGroups(names, group_of)


def known_first(known: pa.Array, rest: DocumentGroups, name: str) -> DocumentGroups:
    """The documents whose ids are in `known` as a first group called `name`, followed by the groups of `rest`."""

    def group_of(document_ids: pa.ChunkedArray) -> Numbers:
        numbers = rest.group_of(document_ids)
        is_known = pc.is_in(document_ids, value_set=known).to_numpy()
        return np.where(is_known, 0, np.where(numbers >= 0, numbers + 1, -1))

    return DocumentGroups([name, *rest.names], group_of)


def _shards(manifest: DatasetManifest, split: str) -> list[ShardEntry]:
    return [shard for shard in manifest.shards if shard.split == split]


def _indexes_and_groups(data_dir: Path, shards: list[ShardEntry], groups: DocumentGroups) -> Iterator[tuple[pa.Table, Numbers]]:
    """Each shard's index, and the number of the group of each row; -1 for rows in no group and removed rows."""
    indexes = [read_index(data_dir, shard) for shard in shards]
    # Of all shards at once: each call hashes the ids of all documents.
    chunks = [chunk for index in indexes for chunk in index["document_id"].chunks]
    group_numbers = groups.group_of(pa.chunked_array(chunks, pa.large_string())).copy()
    start = 0
    for shard, index in zip(shards, indexes, strict=True):
        of_shard = group_numbers[start : start + len(index)]
        of_shard[shard.removed_rows] = -1
        start += len(index)
        yield index, of_shard
