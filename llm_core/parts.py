"""The tokens and the documents of a split, whole or divided into parts by what kind of document they belong to."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus import source_of
from llm_core.shard_file import ShardEntry, open_tokens, read_facts
from llm_core.shards import DatasetManifest
from llm_core.tokenizer import Ids

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """Kinds of documents: their names, and for document ids [documents] the number of each one's kind, -1 for none of them."""

    names: list[str]
    part_of: Callable[[pa.ChunkedArray], Numbers]


ALL = Parts(["all"], lambda document_ids: np.zeros(len(document_ids), dtype=np.int64))
"""One part that holds every document."""


def kept_runs(processed_dir: Path, manifest: DatasetManifest, split: str, parts: Parts | None = None) -> list[list[Ids]]:
    """For each part the tokens of its documents in order, as memory-mapped views [tokens]; verifies each shard.

    Raises:
        DataError: a shard is missing or damaged.
    """
    found: list[list[Ids]] = [[] for _ in (parts or ALL).names]
    for shard in _shards(manifest, split):
        tokens = open_tokens(processed_dir, shard)
        if parts is None and not shard.removed_rows:
            found[0].append(tokens)
            continue
        facts, kinds = _kinds(processed_dir, shard, parts or ALL)
        ends = (facts["token_start"].to_numpy() + facts["token_count"].to_numpy()).tolist()
        # Documents of one kind that follow each other make one run.
        changes = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        for first, last in itertools.pairwise(changes):
            if kinds[first] >= 0:
                found[kinds[first]].append(tokens[ends[first - 1] if first else 0 : ends[last - 1]])
    return found


def kept_documents(
    processed_dir: Path, manifest: DatasetManifest, split: str, parts: Parts | None = None
) -> list[tuple[pa.ChunkedArray, Numbers]]:
    """For each part the ids [documents] in the order of its tokens, and their token counts [documents], end-of-text included."""
    ids: list[list[pa.Array]] = [[] for _ in (parts or ALL).names]
    counts: list[list[Numbers]] = [[np.empty(0, np.int64)] for _ in ids]
    for shard in _shards(manifest, split):
        facts, kinds = _kinds(processed_dir, shard, parts or ALL)
        for part in range(len(ids)):
            chosen = facts.filter(pa.array(kinds == part))
            ids[part] += chosen["document_id"].cast(pa.large_string()).chunks
            counts[part].append(chosen["token_count"].to_numpy())
    return [
        (pa.chunked_array(chunks, pa.large_string()), np.concatenate(numbers))
        for chunks, numbers in zip(ids, counts, strict=True)
    ]


def parts_by_source(documents: pa.Table, names: list[str] | None = None) -> Parts:
    """One part for each source, or for each of `names`; documents: the kept rows of a snapshot."""
    paths = documents["path"].combine_chunks().dictionary_encode()
    sources = [source_of(path) for path in paths.dictionary.to_pylist()]
    names = sorted(set(sources)) if names is None else names
    numbers = {name: number for number, name in enumerate(names)}
    source_numbers = np.array([numbers.get(source, -1) for source in sources], dtype=np.int64)
    of_row = source_numbers[paths.indices.to_numpy()]
    ids = documents["document_id"].combine_chunks()

    def part_of(document_ids: pa.ChunkedArray) -> Numbers:
        rows = pc.index_in(document_ids, value_set=ids)
        found: Numbers = np.append(of_row, -1)[pc.fill_null(rows, len(of_row)).to_numpy()]
        return found

    return Parts(names, part_of)


def known_first(known: pa.Array, rest: Parts, name: str) -> Parts:
    """The documents whose ids are `known` as a first part of this name, the others as `rest` divides them."""

    def part_of(document_ids: pa.ChunkedArray) -> Numbers:
        numbers = rest.part_of(document_ids)
        is_known = pc.is_in(document_ids, value_set=known).to_numpy()
        return np.where(is_known, 0, np.where(numbers >= 0, numbers + 1, -1))

    return Parts([name, *rest.names], part_of)


def _shards(manifest: DatasetManifest, split: str) -> Iterator[ShardEntry]:
    return (shard for shard in manifest.shards if shard.split == split)


def _kinds(processed_dir: Path, shard: ShardEntry, parts: Parts) -> tuple[pa.Table, Numbers]:
    """A shard's facts, and for each of its rows the number of its part; -1 for those that belong to none or are removed."""
    facts = read_facts(processed_dir, shard)
    kinds = parts.part_of(facts["document_id"]).copy()
    kinds[shard.removed_rows] = -1
    return facts, kinds
