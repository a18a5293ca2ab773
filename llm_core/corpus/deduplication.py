"""Duplicates, and near duplicates: documents that share most of their wording with an earlier one.

Near duplicates have similar sets of five-word shingles: a high Jaccard similarity, estimated by MinHash (Broder 1997) and found
by locality-sensitive hashing, both from the package datasketch. Documents are compared in the order of the documents table: one
that is similar to an earlier kept one is dropped. The result depends on the documents only, not on when they were added.

snapshots/signatures.parquet   the signature of each document: a cache
"""

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llm_core.corpus.types import DUPLICATE, KEPT, NEAR_DUPLICATE, RELATIVE
from llm_core.errors import UserError
from llm_core.layout import PreparedData
from llm_core.system import atomic_writer, parquet_bytes, read_parquet

# Hash functions. The standard error of the estimated similarity is at most 0.5 / sqrt(128) = 0.044.
_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")

_SCHEMA = pa.schema([("document_id", pa.large_string()), ("signature", pa.binary(4 * _PERMUTATIONS))])
# Identifies the computation of the signatures; cached ones of another method are replaced.
_METHOD = "datasketch 2 affine32, 128 permutations, 5 words, 1"

_Signature = npt.NDArray[np.uint32]


def check_available(threshold: float) -> None:
    """Raises UserError if datasketch is not installed."""
    if importlib.util.find_spec("datasketch") is None:
        raise UserError(
            f"--near_duplicates {threshold} needs the package datasketch; install it with: "
            'pip install -c constraints.txt -e ".[dedup]"'
        )


def mark_near_duplicates(
    documents: pa.Table, threshold: float, data_dir: Path, read_texts: Callable[[pa.Table], Iterator[str]]
) -> pa.Table:
    """Marks each kept document whose similarity to an earlier kept one is at least `threshold`.

    Reads only documents without a cached signature, through `read_texts`.
    """
    kept = pc.equal(documents["status"], KEPT)
    compared = documents.filter(kept)
    signatures = _signatures(compared, data_dir, read_texts)
    near = np.zeros(documents.num_rows, dtype=bool)
    near[kept.to_numpy()] = list(_near(signatures, threshold))
    status = pc.if_else(pa.array(near), NEAR_DUPLICATE, documents["status"])
    return documents.set_column(documents.schema.get_field_index("status"), "status", status)


def _near(signatures: Iterable[_Signature | None], threshold: float) -> Iterator[bool]:
    """For each signature: whether it is similar to an earlier one that is not itself a near duplicate."""
    from datasketch import LeanMinHash, MinHashLSH

    # A false candidate costs a comparison, a missed one is lost: weigh misses more.
    index = MinHashLSH(threshold, _PERMUTATIONS, weights=(0.1, 0.9))
    first: dict[int, _Signature] = {}
    for number, signature in enumerate(signatures):
        if signature is None:
            yield False
            continue
        minhash = LeanMinHash(seed=1, hashvalues=signature, scheme="affine32")
        near = any(np.mean(first[candidate] == signature) >= threshold for candidate in index.query(minhash))
        if not near:
            first[number] = signature
            index.insert(number, minhash, check_duplication=False)
        yield near


def _signatures(
    documents: pa.Table, data_dir: Path, read_texts: Callable[[pa.Table], Iterator[str]]
) -> Iterator[_Signature | None]:
    """The signature of each document, None for one without words; caches them all."""
    ids = documents["document_id"].combine_chunks()
    cached = _load_cache(data_dir)
    missing = pc.invert(pc.is_in(ids, value_set=cached["document_id"].combine_chunks()))
    computed = _compute(documents.filter(missing), read_texts)
    table = pa.concat_tables([cached, computed])
    table = table.take(pc.index_in(ids, value_set=table["document_id"].combine_chunks()))
    if computed.num_rows or cached.num_rows != table.num_rows:
        with atomic_writer(PreparedData(data_dir).signatures) as file:
            file.write(parquet_bytes(table.replace_schema_metadata({"method": _METHOD}), write_page_checksum=True))
    for value in table["signature"]:
        yield np.frombuffer(value.as_py(), np.uint32) if value.is_valid else None


def _load_cache(data_dir: Path) -> pa.Table:
    try:
        table = read_parquet(PreparedData(data_dir).signatures, page_checksum_verification=True)
        if table.schema.metadata[b"method"].decode() == _METHOD:
            return table.select(_SCHEMA.names).cast(_SCHEMA)
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        pass  # the documents are read again
    return _SCHEMA.empty_table()


def _compute(documents: pa.Table, read_texts: Callable[[pa.Table], Iterator[str]]) -> pa.Table:
    from datasketch import MinHash

    blank = MinHash(_PERMUTATIONS, seed=1, scheme="affine32")
    signatures = []
    for text in read_texts(documents):
        shingles = _shingles(text)
        minhash = blank.copy()
        minhash.update_batch(shingles)
        signatures.append(minhash.hashvalues.tobytes() if shingles else None)
    return pa.table([documents["document_id"].combine_chunks(), pa.array(signatures, _SCHEMA.types[1])], schema=_SCHEMA)


def _shingles(text: str) -> list[bytes]:
    """Every sequence of five words, without case or punctuation; the words of a shorter text are one shingle."""
    words = _WORD.findall(text.casefold())
    shingles = {" ".join(words[n : n + _SHINGLE_WORDS]) for n in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    return [shingle.encode() for shingle in shingles if shingle]


def mark_duplicates(documents: pa.Table) -> pa.Table:
    """Sorts the documents and marks all but the first of each text as duplicates."""
    documents = documents.sort_by([("path", "ascending"), ("start", "ascending"), ("text_start", "ascending")])
    # A duplicate in the parent snapshot may be the first now.
    status = pc.if_else(pc.is_in(documents["status"], value_set=pa.array(RELATIVE)), KEPT, documents["status"])
    usable = pc.equal(status, KEPT).to_numpy()
    # Dictionary codes are assigned in order of first appearance: a first appearance is a code above all earlier ones.
    ids = documents["document_id"].filter(pa.array(usable)).combine_chunks()
    codes = ids.dictionary_encode().indices.to_numpy()
    repeated = np.zeros(len(usable), dtype=bool)
    repeated[usable] = codes <= np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1]
    status = pc.if_else(pa.array(repeated), DUPLICATE, status)
    return documents.set_column(documents.schema.get_field_index("status"), "status", status)
